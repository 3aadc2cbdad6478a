"""Rotary embedding, the KV cache and attention against their float64 definitions, as test_reference.py."""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from tests.kernels import references as ref
from tests.kernels.references import dtypes, examples, normal, seeds, to_array, to_tensor, widths
from vllm_ms_models.kernels import Kernels
from vllm_ms_models.kernels.reference import ReferenceKernels


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return ReferenceKernels()


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    tokens=ref.token_counts,
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    half=st.integers(1, 20),
    rest=st.sampled_from((0, 0, 1, 6, 16)),
    interleaved=st.booleans(),
)
def test_rotary(
    kernels: Kernels,
    seed: int,
    dtype: Any,
    tokens: int,
    heads: tuple[int, int],
    half: int,
    rest: int,
    interleaved: bool,
) -> None:
    rng = np.random.default_rng(seed)
    head_size = 2 * half + rest
    positions = rng.integers(0, 50, tokens)
    angles = np.arange(50)[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos_sin = ref.rounded(np.concatenate((np.cos(angles), np.sin(angles)), 1), ms.float32)
    inputs = [normal(rng, (tokens, count * head_size), dtype) for count in heads]
    query, key = (to_tensor(x, dtype) for x in inputs)
    kernels.rotary(query, key, Tensor(positions), to_tensor(cos_sin, ms.float32), head_size, interleaved)
    for x, tensor in zip(inputs, (query, key), strict=True):
        ref.assert_close(tensor, ref.rotary(x, positions, cos_sin, head_size, interleaved), dtype)


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    tokens=ref.token_counts,
    kv_heads=st.integers(1, 4),
    head_size=widths,
    in_order=st.booleans(),
    data=st.data(),
)
def test_write_kv(
    kernels: Kernels, seed: int, dtype: Any, tokens: int, kv_heads: int, head_size: int, in_order: bool, data: Any
) -> None:
    """Tokens land in their slots of memory that torch sees, nothing else changes, and negative slots are skipped."""
    rng = np.random.default_rng(seed)
    block_size = data.draw(st.sampled_from(ref.block_sizes(kernels)))
    blocks = tokens // block_size + 2
    shape = kernels.cache_shape(blocks, block_size, kv_heads, head_size)
    want = normal(rng, shape, dtype)
    original, cache = ref.shared(ref.pack_cache(kernels, want, dtype), dtype)
    if in_order:  # as in a prefill
        slots = np.arange(tokens) + data.draw(st.sampled_from((0, 1, block_size)))
    else:
        slots = rng.permutation(blocks * block_size)[:tokens]
        slots[rng.random(tokens) < 0.2] = -1
    pair = normal(rng, (2, tokens, kv_heads * head_size), dtype)
    kernels.write_kv(to_tensor(pair[0], dtype), to_tensor(pair[1], dtype), cache, Tensor(slots))
    for token in np.flatnonzero(slots >= 0):
        block, offset = divmod(slots[token], block_size)
        want[block, :, :, offset] = pair[:, token].reshape(2, kv_heads, head_size)
    for memory in (original.to(torch.float64).numpy(), to_array(cache)):
        np.testing.assert_array_equal(ref.unpack_cache(kernels, memory, dtype), want)


@settings(examples, max_examples=150)
@given(
    seed=seeds,
    dtype=dtypes,
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 3),
    head_size=st.sampled_from((1, 7, 16, 32, 40)),
    scale=st.sampled_from((0.1, 0.25, 4.0)),
    window=st.one_of(st.none(), st.integers(1, 20)),
    soft_cap=st.sampled_from((None, 1.5, 30.0)),
    causal=st.booleans(),
    sinks=st.sampled_from((None, 0.0, 3.0)),
    padding=st.sampled_from((0, 0, 3)),
    data=st.data(),
)
def test_paged_attention(
    kernels: Kernels,
    seed: int,
    dtype: Any,
    group: int,
    kv_heads: int,
    head_size: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    causal: bool,
    sinks: float | None,
    padding: int,
    data: Any,
) -> None:
    """`sinks` is how far they are apart: 0 is a sink that is as large as a score of 0."""
    rng = np.random.default_rng(seed)
    paged = data.draw(ref.paged_sequences(rng, dtype, kv_heads, head_size, window, ref.block_sizes(kernels)))
    tokens = int(paged.query_start[-1])
    query = normal(rng, (tokens + padding, group * kv_heads * head_size), dtype)
    _, cache = ref.shared(ref.pack_cache(kernels, paged.cache, dtype), dtype)
    options = (scale, window, soft_cap, causal)
    chosen = None if sinks is None else normal(rng, (group * kv_heads,), ms.float32, sinks)
    tensor = None if chosen is None else to_tensor(chosen, ms.float32)
    got = kernels.paged_attention(to_tensor(query, dtype), cache, paged.tensors(), *options, sinks=tensor)
    assert got.shape == query.shape
    want = ref.attention(query[:tokens], paged, *options, ref.share_error(kernels, dtype), sinks=chosen)
    ref.assert_close(got[:tokens], want, dtype)


@pytest.mark.parametrize("dtype", ref.DTYPES)
@pytest.mark.parametrize(("group", "head_size", "window"), [(7, 64, None), (1, 80, 300), (3, 33, None)])
@pytest.mark.parametrize("sinks", [False, True])
def test_long_sequences(
    kernels: Kernels, dtype: Any, group: int, head_size: int, window: int | None, sinks: bool
) -> None:
    """Several tiles, split among the threads: decode over 700 and 2001 positions, 50 rows of 600, all of 70.

    Sinks are larger than all scores together for some heads, and count once, in however many pieces a row is done.
    """
    rng = np.random.default_rng(0)
    queries, lengths, block_size = np.array([1, 50, 70, 1]), np.array([2001, 600, 70, 700]), 32
    counts = -(-lengths // block_size)
    tables = np.zeros((4, counts.max()), np.int32)
    order = rng.permutation(counts.sum())
    cache = normal(rng, (counts.sum(), 2, 2, block_size, head_size), dtype)
    for table, length, count, end in zip(tables, lengths, counts, np.cumsum(counts), strict=True):
        table[:count] = order[end - count : end]
        cache[table[count - 1], :, :, length - (count - 1) * block_size :] = np.nan
    starts = np.concatenate(([0], np.cumsum(queries)))
    paged = ref.Paged(cache, starts.astype(np.int32), lengths.astype(np.int32), tables)
    query = normal(rng, (queries.sum(), 2 * group * head_size), dtype)
    packed = to_tensor(ref.pack_cache(kernels, cache, dtype), dtype)
    options = (head_size**-0.5, window, None, True)
    chosen = normal(rng, (2 * group,), ms.float32, 6.0) if sinks else None
    tensor = None if chosen is None else to_tensor(chosen, ms.float32)
    got = kernels.paged_attention(to_tensor(query, dtype), packed, paged.tensors(), *options, sinks=tensor)
    want = ref.attention(query, paged, *options, ref.share_error(kernels, dtype), sinks=chosen)
    ref.assert_close(got, want, dtype)


def test_long_prefill_in_chunks(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries taken a few at a time give what they give together."""
    monkeypatch.setattr("vllm_ms_models.kernels.reference._SCORE_CHUNK", 300)
    rng = np.random.default_rng(0)
    cache = normal(rng, kernels.cache_shape(16, 16, 2, 8), ms.float32)
    blocks = rng.permutation(16)
    tables = np.stack((blocks[:10], np.pad(blocks[10:], (0, 4))))
    paged = ref.Paged(cache, *(np.array(array, np.int32) for array in ([0, 37, 60], [40, 23], tables)))
    query = normal(rng, (60, 32), ms.float32)
    packed = to_tensor(ref.pack_cache(kernels, cache, ms.float32), ms.float32)
    for options in ((0.3, None, None, True), (0.3, 5, 20.0, True), (0.3, 6, None, False)):
        got = kernels.paged_attention(to_tensor(query, ms.float32), packed, paged.tensors(), *options)
        ref.assert_close(got, ref.attention(query, paged, *options), ms.float32)
