"""torch <-> MindSpore tensors: the same memory, by NumPy or DLPack."""

import mindspore as ms
import numpy as np
import torch
from mindspore import Tensor
from mindspore.utils.dlpack import to_dlpack

from vllm_ms_models import kernels

DTYPES = {torch.float32: ms.float32, torch.bfloat16: ms.bfloat16, torch.float16: ms.float16}

# NumPy's names of what models give back, by MindSpore's dtype (a singleton; comparing two takes 1 us).
KINDS = {id(ms.float32): "<f4", id(ms.bfloat16): "<i2", id(ms.float16): "<f2"}


def to_mindspore(tensor: torch.Tensor) -> Tensor:
    """A MindSpore tensor over the memory of a contiguous torch CPU tensor (a copy if it is not contiguous)."""
    if tensor.dtype != torch.bfloat16:
        return Tensor.from_numpy(tensor.contiguous().numpy())
    # NumPy has no bfloat16, and MindSpore's `from_dlpack` allocates and zeroes as much memory again, only to drop it.
    return Tensor.from_numpy(tensor.contiguous().view(torch.int16).numpy()).view(ms.bfloat16)


class _Memory:
    """A MindSpore tensor's memory as NumPy's array interface tells of it; the array keeps this, and so the tensor."""

    def __init__(self, tensor: Tensor, kind: str) -> None:
        self.tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "typestr": kind,
            "shape": tensor.shape,
            "data": (tensor.data_ptr(), False),
        }


def to_torch(tensor: Tensor) -> torch.Tensor:
    """A torch tensor over the memory of a MindSpore CPU tensor."""
    kind = KINDS.get(id(tensor.dtype))
    if kind is None or not tensor.is_contiguous() or 0 in tensor.shape:
        # MindSpore's `to_dlpack` runs an operator, which costs 0.1 ms when its threads sleep.
        return torch.utils.dlpack.from_dlpack(to_dlpack(tensor))
    shared = torch.from_numpy(np.asarray(_Memory(tensor, kind)))
    return shared.view(torch.bfloat16) if shared.dtype == torch.int16 else shared


def upload(tensor: torch.Tensor) -> Tensor:
    """`tensor` where the kernels take it: the same memory if that is the host's, else a copy on the device."""
    return kernels.get().place(to_mindspore(tensor))


def download(tensor: Tensor) -> torch.Tensor:
    """The opposite of `upload`."""
    return to_torch(kernels.get().fetch(tensor))


class Staging:
    """The way of a few rows to MindSpore, through memory that both sides know already.

    A new bfloat16 tensor takes an operator (`to_mindspore`), 0.4 ms when MindSpore's threads sleep; a copy takes 2 us.
    """

    ROWS = 64

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.memory = torch.empty(self.ROWS, width, dtype=dtype)
        self.known: dict[int, Tensor] = {}

    def upload(self, tensor: torch.Tensor) -> Tensor:
        """`tensor` `[rows, width]` where the kernels take it, valid until the next call."""
        return kernels.get().place(self.to_mindspore(tensor))

    def to_mindspore(self, tensor: torch.Tensor) -> Tensor:
        """As `upload`, in the host's memory."""
        rows, width = tensor.shape
        if tensor.dtype != torch.bfloat16 or rows > self.ROWS or width != self.memory.shape[1]:
            return to_mindspore(tensor)
        staged = self.memory[:rows]
        staged.copy_(tensor)
        if rows not in self.known:
            self.known[rows] = to_mindspore(staged)
        return self.known[rows]
