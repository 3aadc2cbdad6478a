"""Gated activations against the functions that transformers has under the same names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from tests.layer_testing import (
    UNIT,
    assert_close,
    back_end,  # noqa: F401 (autouse)
    call,
    dtypes,
    examples,
    normal,
    seeds,
    sizes,
    token_counts,
)
from vllm_ms_models.layers.activation import GeluAndMul, SiluAndMul, gated_activation

SUPPORTED = ["silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new"]


@pytest.mark.parametrize("name", SUPPORTED)
@examples
@given(seeds, dtypes, token_counts, sizes, st.sampled_from((0.1, 1.0, 8.0)))
def test_against_transformers(name, seed, dtype, tokens, features, scale):
    """The activation is `gate * share` with 0 <= share <= 1.

    A share 1 / (1 + exp(-z)) is off by share (1 - share) times the relative error of the exponential, which is at most
    (64 + 14 |z|) UNIT with that of z: never above 20 UNIT. erf is off by a few UNIT. Two products follow.
    """
    gate = (normal(seed, tokens, features) * scale).to(dtype)
    up = normal(seed + 1, tokens, features, dtype=dtype)
    want = ACT2FN[name](gate.double()) * up.double()
    error = 24 * UNIT * (gate.double() * up.double()).abs()
    assert_close(call(gated_activation(name), gate, up), want, error, dtype)


def test_the_layer_of_each_name():
    assert isinstance(gated_activation("silu"), SiluAndMul)
    approximate = {name: gated_activation(name).approximate for name in SUPPORTED if name.startswith("gelu")}
    assert approximate == {"gelu": False, "gelu_pytorch_tanh": True, "gelu_new": True}
    assert isinstance(gated_activation("gelu"), GeluAndMul)


@pytest.mark.parametrize("name", ["relu", "quick_gelu", "SiLU", ""])
def test_other_activations_are_refused(name):
    with pytest.raises(ValueError) as caught:
        gated_activation(name)
    assert str(caught.value) == (
        f"Activation {name!r} (hidden_act in config.json) is not supported; "
        "supported are silu, swish, gelu, gelu_pytorch_tanh and gelu_new."
    )
