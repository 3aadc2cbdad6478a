"""A norm over the heads of all ranks, and norms behind a block, against torch's."""

import pytest
import torch

from tests.layer_testing import (
    UNIT,
    SimulatedGroup,
    assert_close,
    back_end,  # noqa: F401 (autouse)
    call,
    load,
    normal,
)
from vllm_ms_models.bridge.tensors import to_mindspore, to_torch
from vllm_ms_models.layers.parallel_norm import ParallelRMSNorm
from vllm_ms_models.layers.post_norm import PostRMSNorm, add

EPS, SIZE = 1e-5, 6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normed(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """And the error of float32, as in test_norm.py."""
    want = torch.nn.functional.rms_norm(x.double(), x.shape[-1:], weight.double(), EPS)
    return want, ((x.shape[-1] + 1) / 2 + 6) * UNIT * want.abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("heads", "size"), [(4, 1), (4, 2), (4, 4), (2, 4), (1, 3)])
def test_heads_of_all_ranks(heads: int, size: int, tokens: int, dtype: torch.dtype) -> None:
    """With more ranks than heads, some ranks have the same ones, which count once."""
    weight, x = normal(0, heads * SIZE), normal(1, tokens, heads * SIZE, dtype=dtype)
    own = max(1, heads // size) * SIZE
    starts = [rank * heads // size * SIZE for rank in range(size)]
    parts = [x[:, start : start + own].contiguous() for start in starts]
    everyones = dict(enumerate(parts))  # what each rank gives, before any of them asks for it
    want, error = normed(x, weight)
    for rank, start in enumerate(starts):
        cell = ParallelRMSNorm("norm", heads, SIZE, EPS, SimulatedGroup(rank, size, everyones))
        load(cell, {"norm.weight": weight})
        chosen = slice(start, start + own)
        # With repeated heads, the sum of squares has up to `size` times as many terms.
        assert_close(call(cell, parts[rank]), want[:, chosen], size * error[:, chosen], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_behind_a_block(dtype: torch.dtype) -> None:
    """The normalised result is rounded, and so is its sum with the stream, which replaces the stream's values."""
    weight, x, stream = normal(0, 37), normal(1, 5, 37, dtype=dtype), normal(2, 5, 37, dtype=dtype)
    before = stream.double()
    cell = PostRMSNorm("norm", 37, EPS)
    load(cell, {"norm.weight": weight})
    residual = to_mindspore(stream)
    found = to_torch(cell(to_mindspore(x), residual))
    want, error = normed(x, weight)
    rounding = (want.abs() + error) * torch.finfo(dtype).eps / 2
    assert_close(found, before + want, error + rounding + UNIT * (before.abs() + want.abs()), dtype)
    assert torch.equal(to_torch(residual), found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum(dtype: torch.dtype) -> None:
    x, stream = normal(1, 5, 37, dtype=dtype), normal(2, 5, 37, dtype=dtype)
    want = x + stream
    weight = to_mindspore(torch.zeros(37))
    assert torch.equal(to_torch(add(to_mindspore(x), to_mindspore(stream), weight)), want)
