"""torch <-> MindSpore tensors: the same memory, by NumPy or DLPack."""

import mindspore as ms
import torch
from mindspore import Tensor, mint
from mindspore.utils.dlpack import from_dlpack, to_dlpack

DTYPES = {torch.float32: ms.float32, torch.bfloat16: ms.bfloat16, torch.float16: ms.float16}


def to_mindspore(tensor: torch.Tensor) -> Tensor:
    """A MindSpore tensor over the memory of a contiguous torch CPU tensor (a copy if it is not contiguous)."""
    if tensor.dtype != torch.bfloat16:
        return Tensor.from_numpy(tensor.contiguous().numpy())
    # NumPy has no bfloat16. This takes longer: MindSpore allocates and zeroes as much memory again, and drops it.
    shared = from_dlpack(torch.utils.dlpack.to_dlpack(tensor.contiguous()))
    if tensor.numel() == 0:  # there is nothing to share, and torch's strides of nothing are not MindSpore's
        return mint.empty(shared.shape, dtype=shared.dtype)
    return shared


def to_torch(tensor: Tensor) -> torch.Tensor:
    """A torch tensor over the memory of a MindSpore CPU tensor."""
    return torch.utils.dlpack.from_dlpack(to_dlpack(tensor))
