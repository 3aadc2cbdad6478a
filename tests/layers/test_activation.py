"""Gated activations: their names in config.json, and the functions that transformers has under them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from tests.layer_testing import (
    UNIT,
    assert_close,
    back_end,  # noqa: F401 (autouse)
    call,
    context,
    dtypes,
    examples,
    linear,
    load,
    normal,
    seeds,
    sizes,
    token_counts,
)
from vllm_ms_models.layers.activation import gated_activation
from vllm_ms_models.layers.linear import GatedColumnParallelLinear

SUPPORTED = ["silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new"]


@pytest.mark.parametrize("name", SUPPORTED)
@examples
@given(seeds, dtypes, token_counts, sizes, sizes, st.booleans())
def test_against_transformers(name, seed, dtype, tokens, inputs, features, bias):
    """The activation is `gate * share` with 0 <= share <= 1 and a slope below 1.13.

    A share 1 / (1 + exp(-z)) is off by share (1 - share) times the relative error of the exponential, which is at most
    (64 + 14 |z|) UNIT with that of z: never above 20 UNIT. erf is off by a few UNIT. Two products follow. The errors of
    gate and up pass through.
    """
    names = ("gate_proj", "up_proj")
    tensors = {}
    for number, part in enumerate(names):
        tensors[f"{part}.weight"] = normal(seed + number, features, inputs, dtype=dtype)
        if bias:
            tensors[f"{part}.bias"] = normal(seed + 2 + number, features)
    layer = GatedColumnParallelLinear(names, inputs, features, name, context(dtype), bias)
    load(layer, tensors)
    x = normal(seed + 4, tokens, inputs, dtype=dtype)
    (gate, gate_error), (up, up_error) = (
        linear(x, tensors[f"{part}.weight"], tensors.get(f"{part}.bias")) for part in names
    )
    slope = 1.13 * gate_error
    error = 24 * UNIT * (gate * up).abs() + slope * (up.abs() + up_error) + (gate.abs() + slope) * up_error
    assert_close(call(layer, x), ACT2FN[name](gate) * up, error, dtype)


def test_the_kernel_of_each_name():
    assert [gated_activation(name) for name in SUPPORTED] == ["silu", "silu", "gelu", "gelu_tanh", "gelu_tanh"]


@pytest.mark.parametrize("name", ["relu", "quick_gelu", "SiLU", ""])
def test_other_activations_are_refused(name):
    with pytest.raises(ValueError) as caught:
        gated_activation(name)
    assert str(caught.value) == (
        f"Activation {name!r} (hidden_act in config.json) is not supported; "
        "supported are silu, swish, gelu, gelu_pytorch_tanh and gelu_new."
    )
