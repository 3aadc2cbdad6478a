"""A norm of features that are spread over tensor-parallel ranks."""

from collections.abc import Iterator

import numpy as np
from mindspore import Tensor

from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.layers.norm import RMSNorm


class ParallelRMSNorm(RMSNorm):
    """Of heads that ranks share: over the features of all of them, as on one rank. Some ranks may have the same heads.

    `x` is `[tokens, features]`, those of this rank's heads, and so is the result. The ranks hand each other their
    features, so that each normalises as much as one would alone; only its own are kept.
    """

    def __init__(self, name: str, num_heads: int, head_size: int, eps: float, group: Group) -> None:
        copies = max(1, group.size // num_heads)  # ranks that have the same head
        own = num_heads * copies // group.size * head_size
        super().__init__(name, group.size * own, eps)
        self.group = group
        self.whole = num_heads * head_size
        # Which feature lies where once those of all ranks are side by side; that some repeat changes no mean.
        self.order = np.concatenate([np.arange(own) + rank // copies * own for rank in range(group.size)])
        self.first, self.own = group.rank * own, own

    def slots(self) -> Iterator[Slot]:
        def load(source: np.ndarray) -> None:
            self.weight.asnumpy()[...] = source[self.order]  # shares memory with the tensor

        yield Slot(self.name, (self.whole,), load)

    def construct(self, x: Tensor) -> Tensor:
        if self.group.size == 1:
            return self.kernels.rms_norm(x, self.weight, self.eps)
        if not self.kernels.compiled and x.shape[0] == 0:
            return x
        normed = self.kernels.rms_norm(self.group.all_gather(x), self.weight, self.eps)
        return normed[:, self.first : self.first + self.own].contiguous()
