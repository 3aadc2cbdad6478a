"""FP8 rows into weights: the reference against the format's definition, and C++ against the reference, bit for bit."""

from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest

from tests.kernels.integers import DYNAMIC
from tests.kernels.references import to_array
from vllm_ms_models.kernels import Integers, Kernels, Weight
from vllm_ms_models.kernels.cpu import CpuKernels, KernelBuildError
from vllm_ms_models.kernels.reference import ReferenceKernels

try:
    BACK_ENDS: list[Kernels] = [ReferenceKernels(), CpuKernels()]
except KernelBuildError:
    BACK_ENDS = [ReferenceKernels()]

CODES = np.arange(256, dtype=np.uint8)
NUMBERS = CODES[(CODES & 0x7F) != 0x7F].view(ml_dtypes.float8_e4m3fn)
SHAPES = [(1, 1, 128, 0), (37, 200, 128, 0), (16, 130, 128, 64), (700, 513, 48, 100), (5, 260, 1 << 30, 7)]


def example(rows: int, columns: int, width: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Random values, the first row zero, and scales."""
    rng = np.random.default_rng(0)
    values = rng.choice(NUMBERS, (rows, columns))
    values[0] = 0
    return values, rng.uniform(1e-4, 1e-2, (rows, (offset + columns - 1) // width + 1)).astype(np.float32)


def matrix(kernels: Kernels, weight: Weight) -> np.ndarray:
    """What unit vectors give."""
    return to_array(kernels.linear(ms.Tensor(np.eye(weight.in_features, dtype=np.float32)), weight)).T


@pytest.mark.parametrize("kernels", BACK_ENDS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16, ms.float16, ms.int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(kernels: Kernels, dtype: ms.Type, shape: tuple[int, int, int, int]) -> None:
    rows, columns, width, offset = shape
    values, scales = example(*shape)
    want = values.astype(np.float32) * scales[:, (offset + np.arange(columns)) // width]
    kinds = {ms.bfloat16: ml_dtypes.bfloat16, ms.float16: np.float16}
    if dtype == ms.int8:
        steps = np.abs(want).max(1, keepdims=True) / np.float32(127)
        integers = np.rint(want / np.where(steps > 0, steps, 1))
        # A unit vector is rounded to 127 steps of 1/127: three roundings of float32, 2e-7 of the value.
        want, tolerance = integers * steps, 3e-7
        weight = kernels.new_integer_weight((3, rows), columns, DYNAMIC)
    else:
        want, tolerance = want.astype(kinds.get(dtype, np.float32)).astype(np.float32), 0.0
        weight = kernels.new_weight((3, rows), columns, dtype)
    middle = rows // 3
    for part in (slice(0, middle), slice(middle, rows)):
        kernels.load_float8(weight, 1, part.start, values[part], scales[part], width, offset)
    found = matrix(kernels, weight)
    np.testing.assert_allclose(found[3:], want, rtol=tolerance, atol=0)
    assert not found[:3].any()


@pytest.mark.parametrize("kernels", BACK_ENDS, ids=lambda kernels: kernels.name)
def test_every_number(kernels: Kernels) -> None:
    weight = kernels.new_weight((1,), len(NUMBERS), ms.float32)
    kernels.load_float8(weight, 0, 0, NUMBERS[None], np.ones((1, 1), np.float32), 256, 0)
    np.testing.assert_array_equal(matrix(kernels, weight)[0], NUMBERS.astype(np.float32))


@pytest.mark.parametrize("kernels", BACK_ENDS, ids=lambda kernels: kernels.name)
def test_refusals(kernels: Kernels) -> None:
    weight = kernels.new_weight((4,), 100, ms.float32)
    groups = kernels.new_integer_weight((4,), 100, Integers(8, 32, "float"))
    values, scales = np.ones((4, 100), ml_dtypes.float8_e4m3fn), np.ones((4, 2), np.float32)
    broken = values.copy()
    broken[2, 3] = np.nan
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((weight, 0, 0, values[:, 1:], scales, 64, 0), r"float8_e4m3fn \[rows, 100\]"),
        ((weight, 0, 0, values.view(np.uint8), scales, 64, 0), "dtype uint8"),
        ((weight, 0, 0, values, scales, 64, 30), r"float32 \[4, 3\] is expected"),
        ((weight, 0, 0, values, scales[1:], 64, 0), r"float32 \[4, 2\] is expected"),
        ((weight, 0, 0, values, scales.astype(np.float64), 64, 0), "dtype float64"),
        ((weight, 0, 0, values, scales, 0, 0), "0 columns each"),
        ((weight, 0, 0, broken, scales, 64, 0), "not numbers"),
        ((weight, 0, 1, values, scales, 64, 0), "rows"),
        ((groups, 0, 0, values, scales, 64, 0), "a scale for each row only"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            kernels.load_float8(*arguments)
