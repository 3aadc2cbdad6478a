"""Attention within the sequences of a batch against torch's, each sequence by itself."""

import pytest
import torch

from tests.layer_testing import assert_close, back_end, normal  # noqa: F401 (autouse)
from tests.layers.test_attention import expected
from vllm_ms_models.bridge.tensors import to_mindspore, to_torch
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.ragged_attention import RaggedAttention, RaggedSequences


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(4, 4, 64), (6, 2, 20), (2, 1, 80)])
@pytest.mark.parametrize("lengths", [[1], [7, 1, 32, 33, 100], [64, 64, 16]])
def test_each_sequence_by_itself(
    dtype: torch.dtype, causal: bool, heads: int, kv_heads: int, head_size: int, lengths: list[int]
) -> None:
    cell = RaggedAttention(heads, kv_heads, head_size, causal=causal)
    ragged = RaggedSequences.of(lengths)
    sizes = (heads, kv_heads, kv_heads)
    for layer in range(2):  # the pages are used again
        query, key, value = (
            normal(3 * layer + i, sum(lengths), size, head_size, dtype=dtype) for i, size in enumerate(sizes)
        )
        rows = (to_mindspore(x.reshape(len(x), -1)) for x in (query, key, value))
        got = to_torch(cell(*rows, ragged))
        alike = Attention(f"layers.{layer}.attn", heads, kv_heads, head_size)
        parts = (x.split(lengths) for x in (got, query, key, value))
        for result, q, k, v in zip(*parts, strict=True):
            wanted, error = expected(alike, q, k, v, causal)
            assert_close(result, wanted, error, dtype)
