"""Multi-head latent attention in the reference back end: one key for all heads, whose first features are the value.

Shared by back ends that keep a position's latent in one row.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from mindspore import Tensor, mint, ops

from vllm_ms_models.kernels.interface import Weight
from vllm_ms_models.kernels.paged_sequences import PagedSequences
from vllm_ms_models.kernels.reference_memory import cast, copy, memory

_SCORE_CHUNK = 1 << 24  # attention scores at a time: 64 MB
_MASKED = -3.0e38
_matmul, _matmul_bt = ops.MatMul(), ops.MatMul(transpose_b=True)


def linear_heads(
    x: Tensor, weights: Sequence[Weight], passed: int, product: Callable[[Tensor, Weight], Tensor]
) -> Tensor:
    """`Kernels.linear_heads`; `product` multiplies float32 rows by a weight, in float32."""
    tokens, features = x.shape
    taken, given = weights[0].in_features, weights[0].out_features
    if features != len(weights) * (taken + passed):
        raise ValueError(f"expected {len(weights)} heads of {taken + passed} features, got {features} features")
    result = mint.empty((tokens, len(weights) * (given + passed)), dtype=x.dtype)
    if tokens == 0:
        return result
    source = memory(x).reshape(tokens, len(weights), taken + passed)
    target = memory(result).reshape(tokens, len(weights), given + passed)
    for head, weight in enumerate(weights):
        rows = Tensor(source[:, head, :taken].astype(np.float32))
        copy(target[:, head, :given], memory(product(rows, weight)))
    target[:, :, given:] = source[:, :, taken:]
    return result


def write(latent: Tensor, key: Tensor, cache: Tensor, slots: Tensor) -> None:
    """`Kernels.write_latent` to a cache `[blocks, block_size, width]`."""
    blocks, block_size, width = cache.shape
    rank = latent.shape[1]
    if cache.dtype != latent.dtype or key.dtype != latent.dtype or rank + key.shape[1] != width:
        raise ValueError(
            f"latent and key are {latent.dtype} of {rank} and {key.dtype} of {key.shape[1]} features, the cache is "
            f"{cache.dtype} of {width}"
        )
    if not slots.shape[0] == latent.shape[0] == key.shape[0]:
        raise ValueError(f"{slots.shape[0]} slots for {latent.shape[0]} latents and {key.shape[0]} keys")
    if slots.shape[0] == 0:
        return
    every = slots.asnumpy()
    if every.max() >= blocks * block_size:
        raise ValueError(f"a slot lies beyond the last of {blocks} blocks of {block_size}")
    kept = every >= 0
    rows = memory(cache).reshape(-1, width)
    rows[every[kept], :rank] = memory(latent)[kept]
    rows[every[kept], rank:] = memory(key)[kept]


def attention(query: Tensor, cache: Tensor, sequences: PagedSequences, scale: float, value_size: int) -> Tensor:
    """`Kernels.mla_attention` over a cache `[blocks, block_size, width]`."""
    tokens, features = query.shape
    width = cache.shape[2]
    if features % width or not 0 < value_size <= width:
        raise ValueError(f"{features} features and values of {value_size} do not fit a cache of {width}")
    heads = features // width
    rows, target, result = _rows_and_result(query, heads, value_size)
    for first, last, latents in _contexts(cache, sequences, tokens):
        keys = latents.astype(np.float32)
        copy(target[first:last], _attend(rows[first:last], keys, keys[:, :value_size], scale))
    return result


def prefill(
    query: Tensor,
    cache: Tensor,
    sequences: PagedSequences,
    keys: Sequence[Weight],
    values: Sequence[Weight],
    scale: float,
    product: Callable[[Tensor, Weight], Tensor],
) -> Tensor:
    """`Kernels.mla_prefill`; `product` as of `linear_heads`."""
    tokens, features = query.shape
    rank, heads = keys[0].in_features, len(keys)
    key_size, value_size = keys[0].out_features + cache.shape[2] - rank, values[0].out_features
    if features != heads * key_size or heads != len(values) or rank > cache.shape[2] or value_size > key_size:
        raise ValueError(
            f"{features} features, {heads} keys of {key_size} and {len(values)} values of {value_size} do not fit each "
            f"other and a cache of {cache.shape[2]}"
        )
    rows, target, result = _rows_and_result(query, heads, value_size)
    for first, last, latents in _contexts(cache, sequences, tokens):
        source = Tensor(latents[:, :rank].astype(np.float32))
        for head in range(heads):
            key, value = (
                memory(cast(product(source, weights[head]), query.dtype)).astype(np.float32)
                for weights in (keys, values)
            )
            key = np.concatenate((key, latents[:, rank:].astype(np.float32)), 1)
            one = slice(first, last), slice(head, head + 1)
            copy(target[one], _attend(rows[one], key, value, scale))
    return result


def _rows_and_result(query: Tensor, heads: int, value_size: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """The query as `[tokens, heads, ...]`, the result, zero, as `[tokens, heads, value_size]`, and its tensor."""
    tokens, features = query.shape
    result = mint.empty((tokens, heads * value_size), dtype=query.dtype)
    target = memory(result).reshape(tokens, heads, value_size)
    target[...] = 0
    return memory(query).reshape(tokens, heads, features // heads), target, result


def _contexts(cache: Tensor, sequences: PagedSequences, tokens: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Of each sequence with query rows: the first, the last + 1, and what is cached of it, `[positions, width]`."""
    if tokens == 0:
        return
    _, block_size, width = cache.shape
    starts, lengths = sequences.query_start.asnumpy(), sequences.seq_lens.asnumpy()
    for table, first, last, length in zip(
        sequences.block_tables.asnumpy(), starts[:-1], starts[1:], lengths, strict=True
    ):
        if last > first:
            pages = memory(cache)[table[: -(-int(length) // block_size)]]
            yield int(first), int(last), pages.reshape(-1, width)[: int(length)]


def _attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Of the last `rows` of `positions` `[rows, heads, width]`: float32 `[rows, heads, values]`.

    `keys` and `values` are float32 `[positions, ...]`, the same for all heads.
    """
    rows, heads, width = query.shape
    result = np.empty((rows, heads, values.shape[1]), np.float32)
    before = len(keys) - rows
    step = max(1, _SCORE_CHUNK // (heads * len(keys)))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        seen = keys[: before + last]
        scores = _matmul_bt(Tensor(query[first:last].reshape(-1, width).astype(np.float32)), Tensor(seen)) * scale
        mask = Tensor((np.arange(len(seen)) <= before + np.arange(first, last)[:, None])[:, None])
        scores = ops.where(mask, scores.reshape(last - first, heads, len(seen)), _MASKED)
        shares = ops.softmax(scores, -1).reshape((last - first) * heads, len(seen))
        sums = _matmul(shares, Tensor(np.ascontiguousarray(values[: len(seen)])))
        result[first:last] = memory(sums.contiguous()).reshape(last - first, heads, -1)
    return result
