"""Dtypes of activations and weights that the fused operators take. **Not run on hardware.**"""

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Tensor

# Tests put float32 in its place, to compare whole models with the other back ends without rounding in between: the
# operators that they compute with take it, those of the hardware do not.
TAKEN: tuple[ms.Type, ...] = (ms.float16, ms.bfloat16)
NUMPY = {
    ms.float16: np.dtype(np.float16),
    ms.bfloat16: np.dtype(ml_dtypes.bfloat16),
    ms.float32: np.dtype(np.float32),
}


def check_dtype(dtype: ms.Type) -> None:
    """NotImplementedError for what the fused operators do not take."""
    if dtype not in TAKEN:
        raise NotImplementedError(
            f"The Ascend kernels take float16 and bfloat16, not {dtype}; serve with --dtype bfloat16."
        )


def check(x: Tensor) -> None:
    """As `check_dtype`, of activations."""
    check_dtype(x.dtype)


def tensor(values: np.ndarray, dtype: ms.Type) -> Tensor:
    """A tensor of these numbers, rounded to `dtype`."""
    with np.errstate(over="ignore"):
        return Tensor.from_numpy(np.ascontiguousarray(values.astype(NUMPY[dtype])))
