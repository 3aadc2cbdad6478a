"""From hidden states to logits: head, scale and soft cap."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.layer_testing import (
    UNIT,
    assert_close,
    back_end,  # noqa: F401 (autouse)
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
from vllm_ms_models.bridge.tensors import to_mindspore, to_torch
from vllm_ms_models.layers.embedding import ParallelLMHead
from vllm_ms_models.layers.logits import LogitsProcessor


def head_of(weight: torch.Tensor) -> ParallelLMHead:
    vocabulary, hidden = weight.shape
    head = ParallelLMHead("lm_head", vocabulary, hidden, context(weight.dtype))
    load(head, {"lm_head.weight": weight})
    return head


@examples
@given(
    seeds,
    dtypes,
    token_counts,
    sizes,
    sizes,
    st.sampled_from((1.0, 0.0625, 3.0)),
    st.sampled_from((None, 0.5, 5.0, 30.0)),
)
def test_logits(seed, dtype, rows, vocabulary, hidden, scale, soft_cap):
    """tanh passes an error of its argument on, or less; its own is that of a sigmoid, 16 UNIT, doubled."""
    weight, x = normal(seed, vocabulary, hidden, dtype=dtype), normal(seed + 1, rows, hidden, dtype=dtype)
    want, error = linear(x, weight, None)
    want, error = want * scale, (error + UNIT * want.abs()) * scale
    if soft_cap is not None:
        error = error + UNIT * want.abs() + 34 * UNIT * soft_cap
        want = torch.tanh(want / soft_cap) * soft_cap
    got = to_torch(LogitsProcessor(scale, soft_cap)(head_of(weight), to_mindspore(x)))
    assert_close(got, want, error, torch.float32)


@pytest.mark.parametrize("size", [1, 1001])
def test_soft_cap_from_end_to_end(size):
    """Far beyond the cap logits are the cap; near zero they are themselves; in between they never cross."""
    values = torch.cat([torch.tensor([-1e4, 1e4]), torch.linspace(-300, 300, size)])
    head = head_of(values[:, None])
    got = to_torch(LogitsProcessor(soft_cap=30.0)(head, to_mindspore(torch.ones(1, 1))))[0]
    assert got[:2].tolist() == [-30.0, 30.0]
    want = torch.tanh(values.double() / 30) * 30
    assert_close(got, want, (34 * 30 + values.double().abs()) * UNIT, torch.float32)
