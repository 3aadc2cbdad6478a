"""RMSNorm, alone and fused with the residual stream, and LayerNorm against torch's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.layer_testing import (
    UNIT,
    assert_close,
    back_end,  # noqa: F401 (autouse)
    call,
    dtypes,
    examples,
    load,
    normal,
    seeds,
    sizes,
    token_counts,
)
from vllm_ms_models.bridge.tensors import to_mindspore, to_torch
from vllm_ms_models.layers.norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

eps = st.sampled_from((1e-6, 1e-5))
scales = st.sampled_from((0.0, 1e-3, 1.0, 30.0))


def expected(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of squares is off by (n + 1) UNIT, its root by half of that; mean, sum, root and two products follow."""
    want = torch.nn.functional.rms_norm(x.double(), x.shape[-1:], weight.double(), eps)
    return want, ((x.shape[-1] + 1) / 2 + 6) * UNIT * want.abs()


def make(layer: type[RMSNorm], weight: torch.Tensor, eps: float, offset: float = 0.0) -> RMSNorm:
    cell = layer("norm", len(weight), eps, offset)
    load(cell, {"norm.weight": weight})
    return cell


@examples
@given(seeds, dtypes, dtypes, token_counts, sizes, eps, scales, st.sampled_from((0.0, 1.0)))
def test_rms_norm(seed, dtype, stored, tokens, features, eps, scale, offset):
    weight = normal(seed, features, dtype=stored)
    x = (normal(seed + 1, tokens, features) * scale).to(dtype)
    cell = make(RMSNorm, weight, eps, offset)
    assert_close(call(cell, x), *expected(x, weight.float() + offset, eps), dtype)


@pytest.mark.parametrize("heads", [1, 3])
def test_rms_norm_of_each_head(heads):
    """`[tokens, heads, head_size]`: only the last axis is normalised."""
    weight, x = normal(0, 24), normal(1, 5, heads, 24)
    assert_close(call(make(RMSNorm, weight, 1e-6), x), *expected(x, weight, 1e-6), torch.float32)


@examples
@given(seeds, dtypes, token_counts, sizes, eps, scales)
def test_residual_is_updated_in_place(seed, dtype, tokens, features, eps, scale):
    """The sum, rounded to the stream's dtype, replaces the residual's values; the norm is that of what is stored."""
    weight = normal(seed, features)
    x = (normal(seed + 1, tokens, features) * scale).to(dtype)
    stream = normal(seed + 2, tokens, features, dtype=dtype)
    total = (stream.float() + x.float()).to(dtype)
    residual, before = to_mindspore(stream), x.clone()
    normed, returned = make(AddRMSNorm, weight, eps)(to_mindspore(x), residual)
    assert returned is residual
    assert torch.equal(stream, total)  # `residual` shares its memory
    assert torch.equal(x, before)
    assert_close(to_torch(normed), *expected(total, weight, eps), dtype)


def test_the_first_layer_starts_the_stream():
    """Without a residual, the input becomes it, unchanged, and later layers add to it."""
    cell, x = make(AddRMSNorm, normal(0, 33), 1e-6), normal(1, 4, 33)
    hidden, before = to_mindspore(x), x.clone()
    normed, stream = cell(hidden, None)
    assert stream is hidden
    assert torch.equal(x, before)
    assert_close(to_torch(normed), *expected(x, normal(0, 33), 1e-6), torch.float32)
    cell(normed, stream)
    assert torch.equal(x, before + to_torch(normed))


@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, True)])
@examples
@given(seeds, dtypes, dtypes, token_counts, sizes, eps, scales)
def test_layer_norm(affine, bias, seed, dtype, stored, tokens, features, eps, scale):
    """The bound is that of tests/kernels/references.py: the mean's error moves all distances from it."""
    cell = LayerNorm("norm", features, eps, affine, bias)
    tensors = {}
    if affine:
        tensors["norm.weight"] = normal(seed, features, dtype=stored)
    if affine and bias:
        tensors["norm.bias"] = normal(seed + 1, features, dtype=stored)
    load(cell, tensors)
    x = (normal(seed + 2, tokens, features) * scale + scale).to(dtype)
    parameters = (tensors[name].double() if name in tensors else None for name in ("norm.weight", "norm.bias"))
    want = torch.nn.functional.layer_norm(x.double(), (features,), *parameters, eps)
    assert_close(call(cell, x), want, layer_norm_error(x, tensors, want, eps), dtype)


@examples
@given(seeds, dtypes, token_counts, sizes, eps)
def test_residual_before_a_layer_norm(seed, dtype, tokens, features, eps):
    """As AddRMSNorm: the sum, rounded, is the stream, and what is normalised; the first layer starts it."""
    tensors = {f"norm.{name}": normal(seed + i, features) for i, name in enumerate(("weight", "bias"))}
    cell = AddLayerNorm("norm", features, eps)
    load(cell, tensors)
    x, stream = (normal(seed + i, tokens, features, dtype=dtype) for i in (2, 3))
    total = (stream.float() + x.float()).to(dtype)
    residual = to_mindspore(stream)
    for start, before in ((total, None), (x, residual)):
        hidden = to_mindspore(start.clone())
        normed, returned = cell(hidden, before)
        assert returned is (hidden if before is None else residual)
        assert torch.equal(to_torch(returned), total)
        want = torch.nn.functional.layer_norm(total.double(), (features,), *(t.double() for t in tensors.values()), eps)
        assert_close(to_torch(normed), want, layer_norm_error(total, tensors, want, eps), dtype)


def layer_norm_error(x: torch.Tensor, tensors: dict[str, torch.Tensor], want: torch.Tensor, eps: float) -> torch.Tensor:
    x, count = x.double(), x.shape[-1]
    weight = tensors.get("norm.weight", torch.ones(count)).double()
    bias = tensors.get("norm.bias", torch.zeros(count)).double()
    scale = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    products = (want - bias).abs()
    moved = (count + 2) * UNIT * x.abs().mean(-1, keepdim=True)
    error = ((count + 2) / 2 + 6) * UNIT * products + moved * scale * (weight.abs() + products)
    return error + UNIT * (x * scale * weight).abs() + 2 * UNIT * (products + bias.abs())
