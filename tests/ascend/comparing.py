"""How results of the Ascend back end, on operators that do what is documented, are compared with the reference's."""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from tests.ascend.arrays import wide
from tests.ascend.standin import StandIn
from tests.ascend.steps import numpy_of
from vllm_ms_models.kernels.ascend import AscendKernels, dtypes
from vllm_ms_models.kernels.reference import ReferenceKernels

DTYPES = pytest.mark.parametrize("dtype", (ms.float16, ms.bfloat16), ids=str)
FLOAT32 = 1e-5  # of sums of a few hundred float32 numbers about 1 in other orders


def unit(dtype: Any) -> float:
    """Of these dtypes' roundings, relative."""
    return {ms.bfloat16: 2.0**-8, ms.float16: 2.0**-11, ms.float32: 2.0**-24}[dtype]


def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the back end takes float32, in which nothing is rounded between operators."""
    monkeypatch.setattr(dtypes, "TAKEN", (ms.float32,))


def both() -> tuple[AscendKernels, ReferenceKernels, StandIn]:
    standin = StandIn()
    return AscendKernels(standin), ReferenceKernels(), standin


def close(got: Tensor, want: Tensor, allowed: Any = 0.0) -> None:
    """Up to `allowed` and a rounding on each side."""
    assert got.shape == want.shape and got.dtype == want.dtype
    error = np.abs(wide(got) - wide(want))
    limit = 2 * unit(want.dtype) * np.abs(wide(want)) + FLOAT32 + allowed
    assert (error <= limit).all(), f"off by {(error / limit).max():.3g} times what is allowed"


def exact(values: np.ndarray, dtype: Any) -> Tensor:
    """Float32 values that `dtype` holds."""
    return Tensor(values.astype(numpy_of(dtype)).astype(np.float32))
