"""The memory of CPU tensors as NumPy arrays, for what the reference back end only moves or converts."""

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Tensor, mint

NUMPY = {
    ms.float32: np.dtype(np.float32),
    ms.float16: np.dtype(np.float16),
    ms.bfloat16: np.dtype(ml_dtypes.bfloat16),
}


class _Buffer:
    """NumPy's view of a tensor's memory as integers; the array made of it keeps the tensor alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tensor.shape,
            "typestr": f"=u{tensor.itemsize}",
        }


def memory(tensor: Tensor, or_int8: bool = False) -> np.ndarray:
    """The memory of a contiguous CPU tensor of floats (caches: or int8) as a writable array."""
    dtype = np.dtype(np.int8) if or_int8 and tensor.dtype == ms.int8 else NUMPY.get(tensor.dtype)
    if dtype is None:
        raise ValueError(f"expected a float32, float16 or bfloat16 tensor, got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous tensor, got strides {tensor.stride()} for shape {tensor.shape}")
    if 0 in tensor.shape:
        return np.empty(tensor.shape, dtype)
    return np.asarray(_Buffer(tensor)).view(dtype)


def cast(x: Tensor, dtype: ms.Type) -> Tensor:
    """`x.astype(dtype)` between float dtypes, to nearest even: the Cast operator is ten times slower in bfloat16."""
    if x.dtype == dtype:
        return x
    x = x.contiguous()
    result = mint.empty(x.shape, dtype=dtype)
    copy(memory(result), memory(x))
    return result


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, rounding to nearest even; values too large for `target` become infinite, silently."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(target, source, casting="unsafe")
