"""Weights and activations to small integers, in NumPy and float32; rint is to nearest, ties to even."""

import numpy as np

CLIP_RATIOS = np.array([1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6], np.float32)
"""Of the largest magnitude of a group: what a group's scale may be chosen for. Beyond, values are cut."""


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
    groups = weight.reshape(rows, width // size, size)
    weights = None if importance is None else importance.reshape(1, -1, size)
    largest = np.abs(groups).max(2, keepdims=True)
    least = np.full(largest.shape, np.inf, np.float32)
    integers, scales = np.empty(groups.shape, np.int8), np.empty(largest.shape, dtype)
    for ratio in CLIP_RATIOS:
        rounded = (largest * (ratio / np.float32(7))).astype(dtype)
        _require_finite(rounded)
        rounded[rounded == 0] = 1
        steps = rounded.astype(np.float32)
        values = np.clip(np.rint(groups / steps), -8, 7)
        errors = np.square(values * steps - groups)
        error = (errors if weights is None else errors * weights).sum(2, keepdims=True)
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(scales, rounded, where=better)
        np.copyto(integers, values.astype(np.int8), where=better)
    return integers.reshape(rows, width), scales.reshape(rows, -1)


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
