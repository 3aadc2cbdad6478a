"""Tensors of any dtype as arrays, and back."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models.kernels.reference_memory import NUMPY, memory

KINDS = {**NUMPY, ms.int64: np.dtype(np.int64)}


def array_of(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor of any dtype, as it is; floats as floats."""
    return memory(tensor) if tensor.dtype in NUMPY else tensor.asnumpy()


def wide(x: Tensor) -> np.ndarray:
    """A float32 copy."""
    return array_of(x).astype(np.float32)


def tensor(values: np.ndarray, dtype: Any) -> Tensor:
    with np.errstate(invalid="ignore"):  # rows that no one computed, in int8
        return Tensor.from_numpy(np.ascontiguousarray(values.astype(KINDS.get(dtype, np.int8))))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
