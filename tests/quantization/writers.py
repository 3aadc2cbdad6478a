"""Quantized checkpoints written from the definitions of their formats, in plain NumPy, and what they compute.

A `Scheme` turns a float matrix into the tensors of a format, and into the arithmetic that they stand for: exact
integers (int64), float64 otherwise, and single float32 operations where activations are rounded to int8. Nothing here
comes from the package under test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

Multiply = Callable[[np.ndarray], np.ndarray]
"""Float32 inputs `[tokens, in]` -> float64 outputs `[tokens, out]`, bias included."""


@dataclass(frozen=True)
class Layer:
    """A float linear to be quantized: `[out, in]`, its bias, and the smallest and largest input seen."""

    weight: np.ndarray
    bias: np.ndarray | None
    lowest: float
    highest: float


@dataclass(frozen=True)
class Written:
    """The tensors of one linear by the ends of their names, and what it computes."""

    tensors: dict[str, np.ndarray]
    multiply: Multiply


@dataclass(frozen=True)
class Scheme:
    """A format's way to write a linear; `config` goes into config.json, `description` names a file of schemes."""

    write: Callable[[Layer, np.random.Generator], Written]
    config: Mapping[str, Any] | None = None
    description: str | None = None
    kind: str = ""  # in the description file
    int8_inputs: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def with_bias(y: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return y if bias is None else y + bias


def of_floats(matrix: np.ndarray, bias: np.ndarray | None) -> Multiply:
    return lambda x: with_bias(x.astype(np.float64) @ matrix.T, bias)


def of_rounded_tokens(centred: np.ndarray, scales: np.ndarray, bias: np.ndarray | None) -> Multiply:
    """Each row of x is rounded to int8 by its largest magnitude; `centred` are weights less zero points, int64."""

    def multiply(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float32)
        largest = np.abs(x).max(1, keepdims=True)
        factor = np.float32(127) / np.where(largest > 0, largest, np.float32(127))
        q = np.rint(x * factor).astype(np.int64)
        step = largest / np.float32(127)
        return with_bias((q @ centred.T) * (step.astype(np.float64) * scales.reshape(1, -1)), bias)

    return multiply


def of_rounded_inputs(
    integers: np.ndarray, addend: np.ndarray, scales: np.ndarray, step: np.ndarray, offset: int, bias: np.ndarray | None
) -> Multiply:
    """x is rounded to int8 by a constant step (one, or one for each input); `scales` are those of the product."""

    def multiply(x: np.ndarray) -> np.ndarray:
        steps = np.rint(x.astype(np.float32) * (np.float32(1) / step.astype(np.float32)))
        q = np.clip(steps + offset, -128, 127).astype(np.int64)
        return with_bias((q @ integers.T + addend) * scales.astype(np.float64).reshape(1, -1), bias)

    return multiply


# --- rounding weights ------------------------------------------------------------------------------------------------


def grouped(matrix: np.ndarray, size: int) -> list[np.ndarray]:
    """Columns in groups; the last may be narrower. 0: all of them."""
    return [matrix[:, first : first + size] for first in range(0, matrix.shape[1], size)] if size else [matrix]


def rounded(
    weight: np.ndarray, bits: int, size: int, symmetric: bool, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers int64 `[out, in]`, scales in `dtype` and zero points `[out, groups]`, all signed."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    integers, scales, zeros = [], [], []
    for group in grouped(weight, size):
        if symmetric:
            scale = (np.abs(group).max(1, keepdims=True) / high).astype(dtype)
            zero = np.zeros(scale.shape, np.int64)
        else:
            top, bottom = np.maximum(group.max(1, keepdims=True), 0), np.minimum(group.min(1, keepdims=True), 0)
            scale = ((top - bottom) / (high - low)).astype(dtype)
            zero = np.clip(np.rint(low - bottom / scale.astype(np.float64)), low, high).astype(np.int64)
        integers.append(np.clip(np.rint(group / scale.astype(np.float64)) + zero, low, high).astype(np.int64))
        scales.append(scale)
        zeros.append(zero)
    return np.concatenate(integers, 1), np.concatenate(scales, 1), np.concatenate(zeros, 1)


def widened(factors: np.ndarray, size: int, width: int) -> np.ndarray:
    """`[out, groups]` for each column."""
    return np.repeat(factors, size, 1)[:, :width] if size else np.repeat(factors, width, 1)


def dequantized(integers: np.ndarray, scales: np.ndarray, zeros: np.ndarray, size: int) -> np.ndarray:
    width = integers.shape[1]
    return (integers - widened(zeros, size, width)) * widened(scales.astype(np.float64), size, width)


# --- packing ---------------------------------------------------------------------------------------------------------


def packed(fields: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Unsigned numbers `[rows, columns]` in int32 words along the columns: number `order[i]` of a word in field i."""
    count = 32 // bits
    rows, columns = fields.shape
    padded = np.zeros((rows, -(-columns // count) * count), np.int64)
    padded[:, :columns] = fields
    words = np.zeros((rows, padded.shape[1] // count), np.int64)
    for i in range(count):
        words |= padded[:, (order[i] if order else i) :: count] << (bits * i)
    return words.astype(np.uint32).view(np.int32)


def bf16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16)
