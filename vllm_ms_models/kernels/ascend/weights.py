"""Matrices of the Ascend back end: rows as the checkpoint has them, `[out, in]`. **Not run on hardware.**

`fused` has the functions of `operators`; the others are those of `Kernels`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models.kernels import integer_checks
from vllm_ms_models.kernels.ascend import dtypes
from vllm_ms_models.kernels.ascend import integers as packed
from vllm_ms_models.kernels.ascend.integers import FloatInputWeight
from vllm_ms_models.kernels.weight import Integers, Weight


@dataclass(frozen=True)
class Int8Weight(Weight):
    """Int8 rows, and what undoes their rounding; `inputs` has a scale and an offset for each part."""

    scales: Tensor = field(kw_only=True)  # float32 [out]
    addends: Tensor = field(kw_only=True)  # int32 [out]
    inputs: list[tuple[float, int]] = field(kw_only=True)


def new_weight(sizes: Sequence[int], in_features: int, dtype: ms.Type) -> Weight:
    dtypes.check_dtype(dtype)
    return Weight(mint.zeros((sum(sizes), in_features), dtype=dtype), tuple(sizes), in_features, dtype)


def load_rows(fused: Any, weight: Weight, part: int, first_row: int, source: np.ndarray) -> None:
    if weight.dtype not in dtypes.NUMPY:
        raise ValueError("rows of floats do not fit in a weight of integers")
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(source.astype(dtypes.NUMPY[weight.dtype]))
    _write(fused, weight.data, weight, part, first_row, rows)


def new_integer_weight(sizes: Sequence[int], in_features: int, integers: Integers) -> Weight:
    if integers.activations == "float":
        return packed.new_weight(sizes, in_features, integers)
    out = sum(sizes)
    return Int8Weight(
        mint.zeros((out, in_features), dtype=ms.int8),
        tuple(sizes),
        in_features,
        ms.int8,
        integers,
        scales=mint.zeros((out,), dtype=ms.float32),
        addends=mint.zeros((out,), dtype=ms.int32),
        inputs=[(1.0, 0)] * len(sizes),
    )


def load_integers(fused: Any, weight: Weight, part: int, first_row: int, values: np.ndarray) -> None:
    if isinstance(weight, FloatInputWeight):
        return packed.load_values(weight, part, first_row, values)
    _write(fused, weight.data, weight, part, first_row, np.ascontiguousarray(values, np.int8))


def load_scales(
    fused: Any,
    weight: Weight,
    part: int,
    first_row: int,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    addends: np.ndarray | None,
) -> None:
    if isinstance(weight, FloatInputWeight):
        return packed.load_scales(weight, part, first_row, scales, zeros, addends)
    assert isinstance(weight, Int8Weight)
    if zeros is not None and np.any(zeros):
        raise NotImplementedError("The Ascend kernels have no zero points of weights: QuantBatchMatmul has none.")
    _write(fused, weight.scales, weight, part, first_row, np.ascontiguousarray(scales[:, 0], np.float32))
    if addends is not None:
        _write(fused, weight.addends, weight, part, first_row, np.ascontiguousarray(addends, np.int32))


def set_input(weight: Weight, part: int, scale: float, offset: int) -> None:
    integer_checks.check_input(weight, part, scale, offset)
    assert isinstance(weight, Int8Weight)
    weight.inputs[part] = scale, offset


@dataclass(frozen=True)
class StaticPart:
    """What the product of a stretch of rows that have one static input takes."""

    input_scales: Tensor  # [in], by which the input is rounded
    input_offsets: Tensor
    values: Tensor  # int8 [rows, in]
    scales: Tensor  # [rows], which undo the roundings
    addends: Tensor


def static_parts(fused: Any, weight: Int8Weight, dtype: ms.Type) -> tuple[StaticPart, ...]:
    """Of a loaded weight for static inputs of `dtype`."""
    ones = mint.ones((weight.in_features,), dtype=ms.float32)
    parts, first = [], 0
    for (scale, offset), group in groupby(zip(weight.inputs, weight.sizes, strict=True), lambda part: part[0]):
        rows = sum(size for _, size in group)
        inputs = (ones * (1.0 / scale)).astype(dtype), (ones * float(offset)).astype(dtype)
        own = weight.data, weight.scales, weight.addends
        data, undo, addends = (t if rows == t.shape[0] else mint.narrow(t, 0, first, rows).contiguous() for t in own)
        if dtype == ms.float16:  # then the operator wants the bits of its float32 scales
            bits = fused.to_host(undo).asnumpy().view(np.uint32).astype(np.int64)
            undo = fused.to_device(Tensor.from_numpy(bits))
        parts.append(StaticPart(*inputs, data, undo, addends))
        first += rows
    return tuple(parts)


def _write(fused: Any, target: Tensor, weight: Weight, part: int, first_row: int, rows: np.ndarray) -> None:
    """Copy `rows` to their place in `target`, whose first axis is that of all parts."""
    if not (0 <= part < len(weight.sizes) and 0 <= first_row and first_row + len(rows) <= weight.sizes[part]):
        raise ValueError(f"rows {first_row} to {first_row + len(rows)} do not fit in part {part} of {weight.sizes}")
    if target.shape[1:] != rows.shape[1:]:
        raise ValueError(f"expected rows of shape {target.shape[1:]}, got an array of shape {rows.shape}")
    if len(rows):
        start = sum(weight.sizes[:part]) + first_row
        fused.write_rows(target, start, fused.to_device(Tensor.from_numpy(rows)))
