"""Weights and activations to small integers, in NumPy and float32; rint is to nearest, ties to even."""

import numpy as np

CLIP_RATIOS = np.array([1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6], np.float32)
"""Of the largest magnitude of a group: what a group's scale may be chosen for. Beyond, values are cut."""
BLOCK = 1 << 17
"""Values that groups are tried on at once: they stay in the cache of a core."""


def int8_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 of float32 `[rows, in]`: integers of the same shape, and scales `[rows, 1]`, max|row| / 127.

    A row of zeros has the scale 1. ValueError for values that are not finite.
    """
    scales = np.abs(weight).max(1, keepdims=True, initial=0) / np.float32(127)
    _require_finite(scales)
    scales[scales == 0] = 1
    return np.clip(np.rint(weight / scales), -127, 127).astype(np.int8), scales


def int4_groups(
    weight: np.ndarray, size: int, importance: np.ndarray | None, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int4 of float32 `[rows, in]`, a scale for `size` neighbours: integers -8 to 7, scales `[rows, groups]`.

    Each group's scale is the one, of those for CLIP_RATIOS of its largest magnitude over 7, that makes
    `sum_k importance_k (w_k - q_k s)^2` least; `importance` [in] is the mean square of each input (None: all equal).
    Scales are in `dtype`, to which they are rounded before weights are divided by them; a group of zeros has scale 1.
    """
    rows, width = weight.shape
    integers, scales = np.empty((rows, width), np.int8), np.empty((rows, width // size), dtype)
    step = max(1, BLOCK // max(width, 1))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        groups = weight[part].reshape(-1, width // size, size)
        weights = None if importance is None else importance.reshape(-1, size)
        integers[part], scales[part] = _best_groups(groups, weights, dtype)
    return integers, scales


def _best_groups(groups: np.ndarray, weights: np.ndarray | None, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Integers `[rows, groups * size]` and scales `[rows, groups]` of `[rows, groups, size]`."""
    largest = np.abs(groups).max(2, keepdims=True)
    least = np.full(largest.shape, np.inf, np.float32)
    scales = np.ones(largest.shape, dtype)
    values = np.empty_like(groups)
    for ratio in CLIP_RATIOS:
        candidates = (largest * (ratio / np.float32(7))).astype(dtype)
        _require_finite(candidates)
        candidates[candidates == 0] = 1
        steps = candidates.astype(np.float32)
        _round_int4(groups, steps, values)
        values *= steps
        values -= groups
        np.square(values, out=values)
        error = np.einsum("rgk->rg", values) if weights is None else np.einsum("rgk,gk->rg", values, weights)
        better = error[..., None] < least
        np.copyto(least, error[..., None], where=better)
        np.copyto(scales, candidates, where=better)
    _round_int4(groups, scales.astype(np.float32), values)
    return values.astype(np.int8).reshape(len(groups), -1), scales[..., 0]


def _round_int4(groups: np.ndarray, steps: np.ndarray, values: np.ndarray) -> None:
    np.divide(groups, steps, out=values)
    np.rint(values, out=values)
    np.clip(values, -8, 7, out=values)


def pack_int4(integers: np.ndarray) -> np.ndarray:
    """int8 -8 to 7, `[rows, in]`, plus 8, eight in an int32 word, first in the lowest bits: `[rows, in / 8]`."""
    fields = (integers + 8).astype(np.uint8)
    pairs = np.ascontiguousarray(fields[:, 0::2] | (fields[:, 1::2] << 4))
    return pairs.view("<i4")


def round_tokens(x: np.ndarray) -> np.ndarray:
    """Float32 `[tokens, in]` as "dynamic" activations have them: rounded to int8 by max|x| of each token."""
    largest = np.abs(x).max(1, keepdims=True, initial=0)
    factors = np.float32(127) / np.where(largest > 0, largest, np.float32(127))
    return np.rint(x * factors) * (largest / np.float32(127))


def round_inputs(x: np.ndarray, scale: np.float32, offset: int) -> np.ndarray:
    """Float32 `[tokens, in]` as "static" activations have them: rounded to int8 by one scale and offset."""
    steps = np.clip(np.rint(x * (np.float32(1) / scale)) + np.float32(offset), -128, 127)
    return (steps - np.float32(offset)) * scale


def symmetric_input(low: float, high: float) -> np.float32:
    """The scale of inputs from `low` to `high`: max|x| / 127; 1 if there are only zeros."""
    return np.float32(max(-low, high)) / np.float32(127) or np.float32(1)


def asymmetric_input(low: float, high: float) -> tuple[np.float32, int]:
    """Scale and offset by which inputs from `low` to `high`, and 0, are -128 to 127."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (np.float32(high) - np.float32(low)) / np.float32(255) or np.float32(1)
    return scale, int(np.clip(np.rint(-128 - np.float32(low) / scale), -128, 127))


def _require_finite(scales: np.ndarray) -> None:
    if not np.isfinite(scales.astype(np.float32)).all():
        raise ValueError("it has values that are infinite, not numbers, or too large for a scale")
