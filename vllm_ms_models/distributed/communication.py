"""MindSpore's own collectives as the `Group` that layers talk to: HCCL between Ascend devices. Not run on hardware."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from mindspore import Tensor, mint, ops
from mindspore.mint import distributed

from vllm_ms_models.distributed.group import Group


@dataclass(frozen=True)
class DeviceGroup(Group):
    """The ranks of a group of `mindspore.mint.distributed`, by its `name` (None: all processes).

    The process group is initialised before (`init_process_group`, `new_group`); tensors are on the device.
    """

    name: str | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        distributed.all_reduce(x, group=self.name)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = mint.empty((self.size * x.shape[0], *x.shape[1:]), dtype=x.dtype)
        distributed.all_gather_into_tensor(parts, x, group=self.name)
        return mint.cat(mint.split(parts, x.shape[0]), -1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        own = mint.empty((x.shape[0] // self.size, *x.shape[1:]), dtype=x.dtype)
        distributed.reduce_scatter_tensor(own, x.contiguous(), group=self.name)
        return own

    def all_to_all(self, x: Tensor) -> Tensor:
        received = mint.empty(x.shape, dtype=x.dtype)
        distributed.all_to_all_single(received, x.contiguous(), group=self.name)
        return received

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        x = x.contiguous()
        distributed.broadcast(x, distributed.get_process_group_ranks(self.name)[source], group=self.name)
        return x

    def barrier(self) -> None:
        distributed.barrier(self.name)


@cache
def _collective(name: str, *arguments: Any) -> Any:
    """Made once, as the operators of kernels/ascend."""
    return getattr(ops, name)(*arguments)


@dataclass(frozen=True)
class GraphGroup(DeviceGroup):
    """The same where layers are compiled (bridge/graph.py): what these call, as operators that make new tensors."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return _collective("AllReduce", ops.ReduceOp.SUM, self.name)(x)

    def all_gather(self, x: Tensor) -> Tensor:
        parts = _collective("AllGather", self.name)(x).reshape(self.size, -1, x.shape[1])
        return parts.transpose(1, 0, 2).reshape(-1, self.size * x.shape[1])

    def all_gather_rows(self, x: Tensor) -> Tensor:
        return _collective("AllGather", self.name)(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return _collective("ReduceScatter", ops.ReduceOp.SUM, self.name)(x)
