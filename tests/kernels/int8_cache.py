"""The KV cache of int8 in NumPy: its rounding, and where each back end keeps what (kv_cache.cpp)."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tests.kernels import references as ref
from vllm_ms_models.kernels import SCALE_BYTES, Kernels
from vllm_ms_models.kernels.cpu import CpuKernels

_NAN = list(np.array([np.nan], np.float32).view(np.int8))


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the last axis as int8, and their float32 scales; 0 and NaN for a row that is not finite."""
    finite = np.isfinite(x).all(-1)
    x = np.where(finite[..., None], x, 0).astype(np.float32)
    largest = np.abs(x).max(-1)
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.float32(127) / largest
    factor[~np.isfinite(factor)] = 0
    integers = np.rint(x * factor[..., None]).astype(np.int8)
    return integers, np.where(finite, largest / np.float32(127), np.float32(np.nan))


def memory_of(cache: Tensor) -> np.ndarray:
    return cache.asnumpy()


def unpacked(kernels: Kernels, memory: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers `[blocks, 2, kv_heads, block_size, head_size]` and scales (without the last axis) of a cache's bytes."""
    blocks, _, heads, block_size, row = memory.shape
    size = row - SCALE_BYTES
    if not isinstance(kernels, CpuKernels):
        return memory[..., :size], np.ascontiguousarray(memory[..., size:]).view(np.float32)[..., 0]
    pieces = memory.reshape(blocks, 2, heads, -1)
    scales = np.ascontiguousarray(pieces[..., block_size * size :]).view(np.float32)
    result = np.empty((blocks, 2, heads, block_size, size), np.int8)
    keys = pieces[:, 0, :, : block_size * size].reshape(blocks, heads, -1, size, 16)
    result[:, 0] = keys.swapaxes(3, 4).reshape(blocks, heads, block_size, size)
    for first in range(0, size, 16):
        width = min(16, size - first)
        panel = pieces[:, 1, :, first * block_size : (first + width) * block_size]
        result[:, 1, ..., first : first + width] = panel.reshape(blocks, heads, block_size, width)
    return result, scales


def filled(kernels: Kernels, paged: ref.Paged, dtype: Any, rng: np.random.Generator) -> tuple[Tensor, ref.Paged]:
    """A cache of what `paged` holds, in random order of writing, and `paged` with the values that it represents.

    Where `paged` has NaN nothing is written: integers are random bytes, scales NaN.
    """
    blocks, _, heads, block_size, size = paged.cache.shape
    memory = rng.integers(-128, 128, kernels.cache_shape(blocks, block_size, heads, size, ms.int8), np.int8)
    if isinstance(kernels, CpuKernels):
        memory.reshape(blocks, 2, heads, -1)[..., block_size * size :] = _NAN * block_size
    else:
        memory[..., size:] = _NAN
    cache = Tensor.from_numpy(memory)
    rows = np.moveaxis(paged.cache, (1, 3), (0, 2)).reshape(2, blocks * block_size, heads * size)
    slots = np.flatnonzero(~np.isnan(rows).any((0, 2)))
    if rng.random() < 0.5:
        slots = rng.permutation(slots)
    key, value = (ref.to_tensor(x[slots], dtype) for x in rows)
    kernels.write_kv(key, value, cache, Tensor(slots))
    integers, scale = rounded(paged.cache)
    exact = integers.astype(np.float64) * scale[..., None]
    return cache, ref.Paged(exact, paged.query_start, paged.seq_lens, paged.block_tables)
