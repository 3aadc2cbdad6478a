"""Multi-head latent attention's kernels against their float64 definitions, as test_reference.py."""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
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
    heads=st.sampled_from((1, 2, 5, 70)),
    taken=widths,
    given_=widths,
    passed=st.sampled_from((0, 1, 8, 17)),
)
def test_linear_heads(
    kernels: Kernels, seed: int, dtype: Any, tokens: int, heads: int, taken: int, given_: int, passed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = normal(rng, (tokens, heads, taken + passed), dtype)
    matrices = normal(rng, (heads, given_, taken), dtype)
    weights = [ref.make_weight(kernels, matrix, [given_], dtype) for matrix in matrices]
    got = kernels.linear_heads(to_tensor(x.reshape(tokens, heads * (taken + passed)), dtype), weights, passed)
    parts = [ref.linear(x[:, head, :taken], matrices[head]) for head in range(heads)]
    rest = x[:, :, taken:]
    values = np.concatenate((np.stack([part[0] for part in parts], 1), rest), 2)
    error = np.concatenate((np.stack([part[1] for part in parts], 1), np.zeros_like(rest)), 2)
    ref.assert_close(got, tuple(part.reshape(tokens, heads * (given_ + passed)) for part in (values, error)), dtype)


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    tokens=ref.token_counts,
    half=st.integers(1, 20),
    before=st.integers(1, 40),
    rest=st.sampled_from((0, 3)),
    interleaved=st.booleans(),
)
def test_rotary_behind_other_features(
    kernels: Kernels, seed: int, dtype: Any, tokens: int, half: int, before: int, rest: int, interleaved: bool
) -> None:
    rng = np.random.default_rng(seed)
    size, tail = before + 2 * half + rest, 2 * half + rest
    positions = rng.integers(0, 50, tokens)
    cos_sin = normal(rng, (50, 2 * half), ms.float32)
    x, y = normal(rng, (tokens, 3 * size), dtype), normal(rng, (tokens, 2 * tail), dtype)
    query, key = to_tensor(x, dtype), to_tensor(y, dtype)
    kernels.rotary(query, key, Tensor(positions), to_tensor(cos_sin, ms.float32), size, interleaved, before)
    ref.assert_close(key, ref.rotary(y, positions, cos_sin, tail, interleaved), dtype)
    values, error = x.reshape(tokens, 3, size).copy(), np.zeros((tokens, 3, size))
    rotated = ref.rotary(values[..., before:].reshape(tokens, 3 * tail), positions, cos_sin, tail, interleaved)
    values[..., before:], error[..., before:] = (part.reshape(tokens, 3, tail) for part in rotated)
    ref.assert_close(query, (values.reshape(x.shape), error.reshape(x.shape)), dtype)


@examples
@given(seed=seeds, dtype=dtypes, tokens=ref.token_counts, rank=widths, rope=st.integers(1, 9), data=st.data())
def test_write_latent(kernels: Kernels, seed: int, dtype: Any, tokens: int, rank: int, rope: int, data: Any) -> None:
    """Tokens land in their slots of memory that torch sees, nothing else changes, and negative slots are skipped."""
    rng, width = np.random.default_rng(seed), rank + rope
    block_size = data.draw(st.sampled_from(ref.block_sizes(kernels)))
    shape = kernels.latent_cache_shape(tokens // block_size + 2, block_size, width)
    assert np.prod(shape) == shape[0] * block_size * width
    want = normal(rng, shape, dtype)
    original, cache = ref.shared(want, dtype)
    slots = rng.permutation(shape[0] * block_size)[:tokens]
    slots[rng.random(tokens) < 0.2] = -1
    latent = normal(rng, (tokens, width), dtype)
    kernels.write_latent(to_tensor(latent[:, :rank], dtype), to_tensor(latent[:, rank:], dtype), cache, Tensor(slots))
    want.reshape(-1, width)[slots[slots >= 0]] = latent[slots >= 0]
    for memory in (original.double().numpy(), to_array(cache)):
        np.testing.assert_array_equal(memory, want)


def check_attention(
    kernels: Kernels, rng: np.random.Generator, dtype: Any, paged: ref.Paged, heads: int, value_size: int, scale: float
) -> None:
    """`paged` has the latents as its keys."""
    tokens, width = int(paged.query_start[-1]), paged.cache.shape[-1]
    paged.cache[:, 1] = paged.cache[:, 0]
    query = normal(rng, (tokens, heads * width), dtype)
    cache = to_tensor(paged.cache[:, 0, 0], dtype)
    got = kernels.mla_attention(to_tensor(query, dtype), cache, paged.tensors(), scale, value_size)
    want = ref.attention(query, paged, scale, None, None, True, ref.share_error(kernels, dtype))
    values, error = (
        part.reshape(tokens, heads, width)[..., :value_size].reshape(tokens, heads * value_size) for part in want
    )
    ref.assert_close(got, (values, error), dtype)


@settings(examples, max_examples=100)
@given(
    seed=seeds,
    dtype=dtypes,
    heads=st.sampled_from((1, 2, 3, 8, 16)),
    width=st.sampled_from((3, 16, 21, 40, 72)),
    rope=st.sampled_from((0, 1, 2, 8)),
    scale=st.sampled_from((0.1, 0.25, 4.0)),
    data=st.data(),
)
def test_mla_attention(
    kernels: Kernels, seed: int, dtype: Any, heads: int, width: int, rope: int, scale: float, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    paged = data.draw(ref.paged_sequences(rng, dtype, 1, width, None, ref.block_sizes(kernels)))
    check_attention(kernels, rng, dtype, paged, heads, max(1, width - rope), scale)


@pytest.mark.parametrize("dtype", ref.DTYPES)
@pytest.mark.parametrize("queries", [[1, 1], [3, 40]])
def test_mla_attention_of_long_sequences(kernels: Kernels, dtype: Any, queries: list[int]) -> None:
    """DeepSeek's sizes; contexts of several tiles, which threads share."""
    rng = np.random.default_rng(0)
    check_attention(kernels, rng, dtype, long_sequences(rng, dtype, queries, [1300, 70], 576), 4, 512, 0.05)


def long_sequences(
    rng: np.random.Generator, dtype: Any, queries: list[int], seq_lens: list[int], width: int
) -> ref.Paged:
    """Two sequences of latents in blocks of 32."""
    lengths, block_size = np.array(seq_lens), 32
    counts = -(-lengths // block_size)
    order = rng.permutation(int(counts.sum()))
    cache = np.full((len(order), 2, 1, block_size, width), np.nan)
    tables = np.full((2, counts.max()), -1)
    for table, length, ids in zip(tables, lengths, np.split(order, counts[:1]), strict=True):
        table[: len(ids)] = ids
        for position in range(length):
            cache[table[position // block_size], 0, 0, position % block_size] = normal(rng, (width,), dtype)
    starts = np.concatenate(([0], np.cumsum(queries)))
    return ref.Paged(cache, *(array.astype(np.int32) for array in (starts, lengths, tables)))


@settings(examples, max_examples=60)
@given(
    seed=seeds,
    dtype=dtypes,
    heads=st.sampled_from((1, 2, 5)),
    rank=st.sampled_from((3, 16, 33)),
    nope=st.sampled_from((2, 16, 21)),
    rope=st.sampled_from((1, 8, 16)),
    data=st.data(),
)
def test_mla_prefill(
    kernels: Kernels, seed: int, dtype: Any, heads: int, rank: int, nope: int, rope: int, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    value_size = data.draw(st.sampled_from(sorted({1, 16, nope, nope + rope} & set(range(nope + rope + 1)))))
    paged = data.draw(ref.paged_sequences(rng, dtype, 1, rank + rope, None, ref.block_sizes(kernels)))
    check_prefill(kernels, rng, dtype, paged, heads, (rank, nope, rope, value_size))


@pytest.mark.parametrize("dtype", ref.DTYPES)
def test_mla_prefill_of_long_sequences(kernels: Kernels, dtype: Any) -> None:
    """DeepSeek's sizes; a prompt that goes on and one that is new, both longer than what is expanded at a time."""
    rng = np.random.default_rng(0)
    paged = long_sequences(rng, dtype, [20, 290], [700, 290], 576)
    check_prefill(kernels, rng, dtype, paged, 3, (512, 128, 64, 128))


def check_prefill(
    kernels: Kernels,
    rng: np.random.Generator,
    dtype: Any,
    paged: ref.Paged,
    heads: int,
    sizes: tuple[int, int, int, int],
) -> None:
    """Against ordinary attention over what the linear layer, which has tests of its own, expands the latents to.

    The reference's products depend, within their bounds, on how many rows there are; that adds to the bounds.
    """
    rank, nope, rope, value_size = sizes
    tokens, size = int(paged.query_start[-1]), nope + rope
    query = normal(rng, (tokens, heads, size), dtype)
    rows = np.nan_to_num(paged.cache[:, 0, 0]).reshape(-1, rank + rope)  # unused positions are NaN
    source = to_tensor(rows[:, :rank], dtype)
    weights, wanted = [], []
    for head in range(heads):
        matrices = [normal(rng, (features, rank), dtype) * rank**-0.5 for features in (nope, value_size)]
        pair = [ref.make_weight(kernels, matrix, [len(matrix)], dtype) for matrix in matrices]
        key, value = (to_array(kernels.linear(source, weight)) for weight in pair)
        both = np.zeros((2, len(rows), size))
        both[0] = np.concatenate((key, rows[:, rank:]), 1)
        both[1, :, :value_size] = value
        blocks, block_size = len(paged.cache), paged.cache.shape[3]
        expanded = both.reshape(2, blocks, 1, block_size, size).transpose(1, 0, 2, 3, 4)
        one = ref.Paged(expanded, paged.query_start, paged.seq_lens, paged.block_tables)
        bounded = ref.attention(query[:, head], one, 0.3, None, None, True, ref.share_error(kernels, dtype))
        values, error = (part[:, :value_size] for part in bounded)
        if isinstance(kernels, ReferenceKernels):
            off = [apart(rows[:, :rank], matrix, dtype) for matrix in matrices]
            scores = 0.3 * np.abs(query[:, head, :nope]) @ off[0]
            error = error + off[1] + 2 * scores[:, None] * np.abs(value).max(initial=0)
        weights.append(pair)
        wanted.append((values, error))
    keys, values_of = zip(*weights, strict=True)
    cache = to_tensor(paged.cache[:, 0, 0], dtype)
    flat = to_tensor(query.reshape(tokens, heads * size), dtype)
    got = kernels.mla_prefill(flat, cache, paged.tensors(), keys, values_of, 0.3)
    joined, errors = (np.concatenate(parts, 1) for parts in zip(*wanted, strict=True))
    ref.assert_close(got, (joined, errors), dtype)


def apart(x: np.ndarray, matrix: np.ndarray, dtype: Any) -> np.ndarray:
    """How far two right results for a feature can be from each other, at most: both bounds and a rounding each."""
    values, error = ref.linear(x, matrix)
    return (2 * error + ref.ulp(np.abs(values) + error, dtype)).max(0, initial=0)


def test_what_does_not_fit_is_refused(kernels: Kernels) -> None:
    x, cache = to_tensor(np.ones((2, 6)), ms.float32), to_tensor(np.ones((2, 16, 3)), ms.float32)
    one, half, two = (
        to_tensor(np.ones((2, 1)), ms.float32),
        to_tensor(np.ones((2, 2)), ms.float16),
        Tensor(np.arange(2)),
    )
    weight = ref.make_weight(kernels, np.ones((2, 3)), [2], ms.float32)
    paged = ref.Paged(np.zeros(0), *(np.array(values, np.int32) for values in ([0, 2], [2], [[0]]))).tensors()
    for call in (
        lambda: kernels.linear_heads(x, [weight]),
        lambda: kernels.linear_heads(x, [weight, weight], 1),
        lambda: kernels.write_latent(x, x, cache, Tensor(np.arange(2))),
        lambda: kernels.write_latent(x, one, cache, two),
        lambda: kernels.write_latent(half, half, cache, two),
        lambda: kernels.write_latent(to_tensor(np.ones((2, 2)), ms.float32), one, cache, two + 31),
        lambda: kernels.mla_attention(x, cache, paged, 1.0, 4),
        lambda: kernels.mla_attention(to_tensor(np.ones((2, 4)), ms.float32), cache, paged, 1.0, 3),
        lambda: kernels.mla_prefill(x, cache, paged, [weight], [weight], 1.0),
        lambda: kernels.mla_prefill(x, cache, paged, [weight] * 3, [weight] * 2, 1.0),
    ):
        with pytest.raises(ValueError):
            call()
