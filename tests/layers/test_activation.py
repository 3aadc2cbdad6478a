"""Activations: their names in config.json, and the functions that transformers has under them."""

import pytest
import torch
from hypothesis import given, settings
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
    on_ranks,
    seeds,
    sizes,
    token_counts,
)
from vllm_ms_models.layers.activation import gated_activation, plain_activation
from vllm_ms_models.layers.linear import GatedColumnParallelLinear
from vllm_ms_models.layers.mlp import MLP

SUPPORTED = ["silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new"]
PLAIN = [*SUPPORTED, "gelu_fast", "quick_gelu", "relu"]


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


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(PLAIN), st.integers(1, 2), seeds, dtypes, token_counts, sizes, sizes, sizes, st.booleans())
def test_plain_block_against_transformers(name, ranks, seed, dtype, tokens, inputs, half, outputs, bias):
    """What is between the matrices is rounded before and after the activation, whose slope is below 1.13."""
    features = half * ranks
    shapes = {"fc1": (features, inputs), "fc2": (outputs, features)}
    tensors = {f"{part}.weight": normal(seed + len(part), *shape, dtype=dtype) for part, shape in shapes.items()}
    if bias:
        tensors |= {f"{part}.bias": normal(seed + 2, shape[0]) for part, shape in shapes.items()}
    x = normal(seed + 4, tokens, inputs, dtype=dtype)

    def run(group):
        layer = MLP(("fc1", "fc2"), inputs, features, name, context(dtype, group), bias, outputs)
        load(layer.up_proj, {key: tensor for key, tensor in tensors.items() if key.startswith("fc1")})
        load(layer.down_proj, {key: tensor for key, tensor in tensors.items() if key.startswith("fc2")})
        return call(layer, x)

    rounding = torch.finfo(dtype).eps / 2
    up, error = linear(x, tensors["fc1.weight"], tensors.get("fc1.bias"))
    error = error + rounding * (up.abs() + error)
    middle = ACT2FN[name](up)
    error = 1.13 * error + 24 * UNIT * up.abs()
    error = error + rounding * (middle.abs() + error)
    weight = tensors["fc2.weight"].double()
    want, products = linear(middle, weight, tensors.get("fc2.bias"))
    error = products + error @ weight.abs().T
    error = error + (ranks > 1) * 2 * rounding * (middle.abs() @ weight.abs().T + want.abs())  # each rank's summand
    for result in on_ranks(ranks, run):
        assert_close(result, want, error, dtype)


@pytest.mark.parametrize("name", ["relu", "quick_gelu", "SiLU", ""])
def test_other_activations_are_refused(name):
    with pytest.raises(ValueError) as caught:
        gated_activation(name)
    assert str(caught.value) == (
        f"Activation {name!r} (hidden_act in config.json) is not supported; "
        "supported are silu, swish, gelu, gelu_pytorch_tanh and gelu_new."
    )
    if name not in PLAIN:
        with pytest.raises(ValueError, match=r"gelu_fast, quick_gelu and relu\.$"):
            plain_activation(name)
