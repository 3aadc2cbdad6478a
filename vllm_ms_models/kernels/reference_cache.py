"""A KV cache of int8 in the reference back end: rows of integers, each followed by the four bytes of its scale."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from vllm_ms_models.kernels import reference_integers
from vllm_ms_models.kernels.interface import SCALE_BYTES


def head_size_of(cache: Tensor) -> int:
    """Features of a head in a cache of the shape that `Kernels.cache_shape` gives."""
    return cache.shape[-1] - (SCALE_BYTES if cache.dtype == ms.int8 else 0)


def rounded_rows(x: Tensor, heads: int) -> np.ndarray:
    """Float32 `[tokens, heads * head_size]` as int8 `[tokens, heads, head_size + SCALE_BYTES]`."""
    tokens, features = x.shape
    rows = x.reshape(tokens * heads, features // heads)
    finite = ops.all(ops.isfinite(rows), 1, keep_dims=True)
    rounded, scales = reference_integers.round_by_token(ops.select(finite, rows, 0.0))
    scales = np.where(finite.asnumpy(), scales.asnumpy(), np.float32(np.nan))
    both = np.concatenate((rounded.asnumpy().astype(np.int8), scales.view(np.int8)), 1)
    return both.reshape(tokens, heads, -1)


def widened(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integers of `rows` `[..., head_size + SCALE_BYTES]` in float32 `[..., head_size]`, and the scales `[...]`."""
    scales = np.ascontiguousarray(rows[..., -SCALE_BYTES:]).view(np.float32)[..., 0]
    return rows[..., :-SCALE_BYTES].astype(np.float32), scales
