"""Multi-head latent attention in the reference back end: one key for all heads, whose first features are the value.

Shared by back ends that keep a position's latent in one row.
"""

from collections.abc import Callable, Sequence

import numpy as np
from mindspore import Tensor, mint, ops

from vllm_ms_models.kernels.interface import PagedSequences, Weight
from vllm_ms_models.kernels.reference_memory import copy, memory

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


def write(latent: Tensor, cache: Tensor, slots: Tensor) -> None:
    """`Kernels.write_latent` to a cache `[blocks, block_size, width]`."""
    blocks, block_size, width = cache.shape
    if cache.dtype != latent.dtype or latent.shape[1] != width:
        raise ValueError(
            f"the latent is {latent.dtype} of {latent.shape[1]} features, the cache is {cache.dtype} of {width}"
        )
    if slots.shape[0] != latent.shape[0]:
        raise ValueError(f"{slots.shape[0]} slots for {latent.shape[0]} tokens")
    if slots.shape[0] == 0:
        return
    every = slots.asnumpy()
    if every.max() >= blocks * block_size:
        raise ValueError(f"a slot lies beyond the last of {blocks} blocks of {block_size}")
    kept = every >= 0
    memory(cache).reshape(-1, width)[every[kept]] = memory(latent)[kept]


def attention(query: Tensor, cache: Tensor, sequences: PagedSequences, scale: float, value_size: int) -> Tensor:
    """`Kernels.mla_attention` over a cache `[blocks, block_size, width]`."""
    tokens, features = query.shape
    _, block_size, width = cache.shape
    if features % width or not 0 < value_size <= width:
        raise ValueError(f"{features} features and values of {value_size} do not fit a cache of {width}")
    heads = features // width
    result = mint.empty((tokens, heads * value_size), dtype=query.dtype)
    if tokens == 0:
        return result
    target = memory(result)
    target[...] = 0
    rows = memory(query).reshape(tokens, heads, width)
    starts, lengths = sequences.query_start.asnumpy(), sequences.seq_lens.asnumpy()
    for table, row, end, length in zip(sequences.block_tables.asnumpy(), starts[:-1], starts[1:], lengths, strict=True):
        if row == end:
            continue
        pages = memory(cache)[table[: -(-int(length) // block_size)]]
        keys = pages.reshape(-1, width)[: int(length)].astype(np.float32)
        step = max(1, _SCORE_CHUNK // (heads * int(length)))
        for first in range(int(row), int(end), step):
            last = min(first + step, int(end))
            positions = np.arange(first, last) + int(length) - int(end)
            taken = rows[first:last].astype(np.float32)
            copy(target[first:last], _attend(taken, keys[: positions[-1] + 1], positions, scale, value_size))
    return result


def _attend(query: np.ndarray, keys: np.ndarray, positions: np.ndarray, scale: float, value_size: int) -> np.ndarray:
    """Of `query` `[rows, heads, width]` at `positions`: float32 `[rows, heads * value_size]`."""
    rows, heads, width = query.shape
    scores = _matmul_bt(Tensor(query.reshape(-1, width)), Tensor(keys)) * scale
    mask = Tensor((np.arange(len(keys)) <= positions[:, None])[:, None])
    scores = ops.where(mask, scores.reshape(rows, heads, len(keys)), _MASKED)
    shares = ops.softmax(scores, -1).reshape(rows * heads, len(keys))
    values = Tensor(np.ascontiguousarray(keys[:, :value_size]))
    return memory(_matmul(shares, values).contiguous()).reshape(rows, heads * value_size)
