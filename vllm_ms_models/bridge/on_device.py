"""What a model on a device of its own memory gives vLLM: tensors that come to the host only if something reads them."""

from typing import Any

import numpy as np
import torch
from mindspore import Tensor, mint

from vllm_ms_models import kernels
from vllm_ms_models.bridge.tensors import download


class OnDevice:
    """A tensor of a device's memory in place of a torch tensor: whatever torch does with it, it does with a copy.

    Once there is a copy, it counts: torch may have written into it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._copy: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.tensor.shape)

    @property
    def is_read(self) -> bool:
        """Whether there is a copy."""
        return self._copy is not None

    @property
    def host(self) -> torch.Tensor:
        """The copy."""
        if self._copy is None:
            self._copy = download(self.tensor)
        return self._copy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)

    def __getitem__(self, key: Any) -> Any:
        return self.host[key]

    def __len__(self) -> int:
        return self.tensor.shape[0]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_read(args), **_read(kwargs or {}))


class RowsOnDevice(OnDevice):
    """Hidden states `[tokens, hidden]`, of which vLLM takes rows for `compute_logits`: they stay on the device."""

    def __getitem__(self, key: Any) -> Any:
        if self.is_read or len(self) == 0:
            return super().__getitem__(key)
        if isinstance(key, slice) and key.step in (None, 1):
            start, stop, _ = key.indices(len(self))
            return RowsOnDevice(mint.narrow(self.tensor, 0, start, max(0, stop - start)).contiguous())
        sampling = kernels.get().sampling
        if isinstance(key, torch.Tensor) and not key.dtype.is_floating_point and len(key) and sampling is not None:
            return RowsOnDevice(sampling.rows(self.tensor, Tensor.from_numpy(key.numpy().astype(np.int32))))
        return super().__getitem__(key)


def _read(value: Any) -> Any:
    """`value` with torch tensors in place of those on the device."""
    if isinstance(value, OnDevice):
        return value.host
    if isinstance(value, tuple | list):
        return type(value)(map(_read, value))
    return {key: _read(each) for key, each in value.items()} if isinstance(value, dict) else value
