"""The memory that vLLM's KV cache is allocated in."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vllm_ms_models import memory


class CacheMemory(TorchFunctionMode):
    """Within this context `torch.zeros` gives memory of `memory.fresh`; or none, if the cache is on a device.

    torch would write zeros to all of it, page by page of 4 KB; so a page is made when a block in it is first used.
    """

    def __init__(self, on_device: bool = False) -> None:
        super().__init__()
        self.on_device = on_device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros:
            like = torch.empty(*args, **{**kwargs, "device": "meta"})
            if self.on_device:
                return like
            if like.nbytes:
                return torch.frombuffer(memory.fresh(like.nbytes), dtype=like.dtype).view(like.shape)
        return func(*args, **kwargs)
