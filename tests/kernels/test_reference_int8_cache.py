"""The KV cache of int8 against its definition in NumPy, as test_reference_attention.py; for the C++ kernels, too."""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from tests.kernels import int8_cache
from tests.kernels import references as ref
from tests.kernels.int8_cache import filled, memory_of, unpacked
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
    kv_heads=st.integers(1, 4),
    head_size=widths,
    in_order=st.booleans(),
    data=st.data(),
)
def test_write_int8(
    kernels: Kernels, seed: int, dtype: Any, tokens: int, kv_heads: int, head_size: int, in_order: bool, data: Any
) -> None:
    """Integers and scales are those of the definition, to the bit; no other byte changes."""
    rng = np.random.default_rng(seed)
    block_size = data.draw(st.sampled_from(ref.block_sizes(kernels)))
    blocks = tokens // block_size + 2
    shape = kernels.cache_shape(blocks, block_size, kv_heads, head_size, ms.int8)
    memory = rng.integers(-128, 128, shape, np.int8)
    cache = Tensor.from_numpy(memory)
    want, scales = (array.copy() for array in unpacked(kernels, memory))
    if in_order:
        slots = np.arange(tokens) + data.draw(st.sampled_from((0, 1, block_size)))
    else:
        slots = rng.permutation(blocks * block_size)[:tokens]
        slots[rng.random(tokens) < 0.2] = -1
    size = rng.choice((0.0, 1e-30, 1.0, 3000.0), (2, tokens, kv_heads, 1))
    pair = ref.rounded(rng.standard_normal((2, tokens, kv_heads, head_size)) * size, dtype)
    odd = rng.random((2, tokens, kv_heads)) < 0.1
    pair[odd, rng.integers(head_size)] = rng.choice((np.nan, np.inf, -np.inf))
    key, value = (to_tensor(x.reshape(tokens, kv_heads * head_size), dtype) for x in pair)
    kernels.write_kv(key, value, cache, Tensor(slots))
    rounded, scale = int8_cache.rounded(pair)
    for token in np.flatnonzero(slots >= 0):
        block, offset = divmod(slots[token], block_size)
        want[block, :, :, offset], scales[block, :, :, offset] = rounded[:, token], scale[:, token]
    got = unpacked(kernels, memory_of(cache))
    np.testing.assert_array_equal(got[0], want)
    np.testing.assert_array_equal(got[1].view(np.int32), scales.view(np.int32))


@settings(examples, max_examples=100)
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
    sinks=st.booleans(),
    data=st.data(),
)
def test_attention_to_int8(
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
    sinks: bool,
    data: Any,
) -> None:
    """Any mix of prefill and decode; what must not be read has random bytes for integers and NaN for scales."""
    rng = np.random.default_rng(seed)
    paged = data.draw(ref.paged_sequences(rng, dtype, kv_heads, head_size, window, ref.block_sizes(kernels)))
    cache, exact = filled(kernels, paged, dtype, rng)
    query = normal(rng, (int(paged.query_start[-1]), group * kv_heads * head_size), dtype)
    options = (scale, window, soft_cap, causal)
    chosen = normal(rng, (group * kv_heads,), ms.float32) if sinks else None
    tensor = None if chosen is None else to_tensor(chosen, ms.float32)
    got = kernels.paged_attention(to_tensor(query, dtype), cache, exact.tensors(), *options, sinks=tensor)
    want = ref.attention(query, exact, *options, ref.share_error(kernels, dtype), scaled=True, sinks=chosen)
    ref.assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", ref.DTYPES)
@pytest.mark.parametrize(("group", "head_size", "window"), [(7, 64, None), (1, 80, 300), (3, 33, None), (2, 128, None)])
@pytest.mark.parametrize("block_size", [32, 48])
def test_long_int8_sequences(
    kernels: Kernels, dtype: Any, group: int, head_size: int, window: int | None, block_size: int
) -> None:
    """Several tiles, split among the threads: decode over 700 and 2001 positions, 50 rows of 600, all of 70."""
    rng = np.random.default_rng(0)
    queries, lengths = np.array([1, 50, 70, 1]), np.array([2001, 600, 70, 700])
    counts = -(-lengths // block_size)
    tables = np.zeros((4, counts.max()), np.int32)
    order = rng.permutation(counts.sum())
    floats = normal(rng, (counts.sum(), 2, 2, block_size, head_size), dtype)
    for table, length, count, end in zip(tables, lengths, counts, np.cumsum(counts), strict=True):
        table[:count] = order[end - count : end]
        floats[table[count - 1], :, :, length - (count - 1) * block_size :] = np.nan
    starts = np.concatenate(([0], np.cumsum(queries)))
    paged = ref.Paged(floats, starts.astype(np.int32), lengths.astype(np.int32), tables)
    cache, exact = filled(kernels, paged, dtype, rng)
    query = normal(rng, (queries.sum(), 2 * group * head_size), dtype)
    options = (head_size**-0.5, window, None, True)
    got = kernels.paged_attention(to_tensor(query, dtype), cache, exact.tensors(), *options)
    want = ref.attention(query, exact, *options, ref.share_error(kernels, dtype), scaled=True)
    ref.assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", ref.DTYPES)
@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("tokens", "context"), [(40, 0), (3, 37)], ids=["prefill", "few rows"])
def test_what_is_not_finite_stays_where_it_is(
    kernels: Kernels, dtype: Any, part: int, bad: float, tokens: int, context: int
) -> None:
    """A token sees NaN only in the heads, and from the positions, that it attends to."""
    rng = np.random.default_rng(0)
    heads, size, place, length = 2, 16, 38, tokens + context
    pair = normal(rng, (2, length, heads, size), dtype)
    slots = Tensor(np.arange(length) + 16)
    query = normal(rng, (tokens, heads * size), dtype)
    table = np.array([[1, 2, 3]], np.int32)
    paged = ref.Paged(pair, np.array([0, tokens], np.int32), np.array([length], np.int32), table)
    results = []
    for value in (pair[part, place, 1, 3], bad):
        pair[part, place, 1, 3] = value
        cache = Tensor.from_numpy(np.zeros(kernels.cache_shape(4, 16, heads, size, ms.int8), np.int8))
        key, value_rows = (to_tensor(x.reshape(length, -1), dtype) for x in pair)
        kernels.write_kv(key, value_rows, cache, slots)
        result = kernels.paged_attention(to_tensor(query, dtype), cache, paged.tensors(), 0.25)
        results.append(to_array(result).reshape(tokens, heads, size))
    good, poisoned = results
    assert np.isfinite(good).all()
    first = place - context
    assert np.isnan(poisoned[first:, 1]).all()
    np.testing.assert_array_equal(poisoned[:, 0], good[:, 0])
    np.testing.assert_array_equal(poisoned[:first, 1], good[:first, 1])


def test_bytes_of_an_int8_cache(kernels: Kernels) -> None:
    """A byte for each feature and four for each scale."""
    assert np.prod(kernels.cache_shape(5, 32, 2, 64, ms.int8)) == 5 * 2 * 32 * 2 * (64 + 4)
    assert kernels.cache_shape(5, 32, 2, 64) == kernels.cache_shape(5, 32, 2, 64, ms.bfloat16)


def test_another_dtype_of_the_cache_is_refused(kernels: Kernels) -> None:
    x = to_tensor(np.zeros((1, 8)), ms.float32)
    cache = to_tensor(np.zeros(kernels.cache_shape(1, 16, 1, 8)), ms.float16)
    with pytest.raises(ValueError, match="cache"):
        kernels.write_kv(x, x, cache, Tensor(np.zeros(1, np.int64)))
