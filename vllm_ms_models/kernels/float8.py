"""Rows of FP8 (e4m3) on their way into weights: checks that the back ends share, and what they compute, in NumPy."""

import ml_dtypes
import numpy as np

from vllm_ms_models.kernels.interface import Kernels, Weight


def check(weight: Weight, values: np.ndarray, scales: np.ndarray, width: int, offset: int) -> None:
    """ValueError unless `values` are numbers that `weight` can take, with a scale for each."""
    if values.dtype != ml_dtypes.float8_e4m3fn or values.ndim != 2 or values.shape[1] != weight.in_features:
        raise ValueError(
            f"Values of shape {values.shape} and dtype {values.dtype} cannot be loaded; float8_e4m3fn "
            f"[rows, {weight.in_features}] is expected."
        )
    if width < 1 or offset < 0:
        raise ValueError(f"Scales cannot be those of {width} columns each, from column {offset} on.")
    count = max(-(-(offset + weight.in_features) // width), 1)
    if scales.dtype != np.float32 or scales.ndim != 2 or len(scales) != len(values) or scales.shape[1] < count:
        raise ValueError(
            f"Scales of shape {scales.shape} and dtype {scales.dtype} do not fit; float32 [{len(values)}, {count}] is "
            "expected."
        )
    if weight.integers is not None and (weight.integers.bits, weight.integers.group_size) != (8, 0):
        raise ValueError("FP8 can be rounded to int8 with a scale for each row only.")
    if ((values.view(np.uint8) & 0x7F) == 0x7F).any():
        raise ValueError("it has values that are not numbers")


def load(
    kernels: Kernels,
    weight: Weight,
    part: int,
    first_row: int,
    values: np.ndarray,
    scales: np.ndarray,
    width: int,
    offset: int,
) -> None:
    """`Kernels.load_float8` of a back end that has nothing quicker."""
    check(weight, values, scales, width, offset)
    rows = widened(values, scales, width, offset)
    if weight.integers is None:
        return kernels.load_rows(weight, part, first_row, rows)
    integers, factors = rounded(rows)
    kernels.load_integers(weight, part, first_row, integers)
    kernels.load_scales(weight, part, first_row, factors)


def widened(values: np.ndarray, scales: np.ndarray, width: int, offset: int) -> np.ndarray:
    """`values[i, j] * scales[i, (offset + j) // width]` in float32."""
    columns = np.arange(offset, offset + values.shape[1]) // width
    return values.astype(np.float32) * scales[:, columns]


def rounded(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers int8 of float32 rows, and scales `[rows, 1]`."""
    scales = np.abs(rows).max(1, keepdims=True, initial=0) / np.float32(127)
    return np.rint(rows / np.where(scales > 0, scales, np.float32(1))).astype(np.int8), scales
