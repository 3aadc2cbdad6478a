"""vLLM's process groups as the `Group` that layers talk to.

Devices of their own memory have MindSpore's collectives (distributed/communication.py). On CPUs, ranks of one host
share memory (distributed/shared_memory.py), others send messages by gloo. That works on the tensors' own memory, which
torch and MindSpore share; a sum of 16-bit floats is rounded once for each rank that is added.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from mindspore import Tensor, mint
from vllm.config import ParallelConfig
from vllm.distributed.parallel_state import (
    GroupCoordinator,
    get_dp_group,
    get_pp_group,
    get_tp_group,
    get_world_group,
)
from vllm.distributed.utils import get_pp_indices
from vllm.utils.network_utils import get_loopback_ip, get_open_port

from vllm_ms_models import kernels
from vllm_ms_models.bridge.tensors import to_mindspore, to_torch
from vllm_ms_models.distributed.communication import DeviceGroup, GraphGroup
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.distributed.shared_memory import share_memory
from vllm_ms_models.distributed.stage import Stage
from vllm_ms_models.kernels.cpu import CpuKernels


@dataclass(frozen=True)
class TorchGroup(Group):
    """The ranks of a torch process group, of CPU tensors."""

    process_group: Any = None

    def all_reduce(self, x: Tensor) -> Tensor:
        x, shared = _shared(x)
        if shared.numel():
            dist.all_reduce(shared, group=self.process_group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        _, shared = _shared(x)
        parts = shared.new_empty(self.size, *shared.shape)
        if shared.numel():
            dist.all_gather(list(parts.unbind()), shared, group=self.process_group)
        return to_mindspore(torch.cat(list(parts.unbind()), -1))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        summed = to_torch(self.all_reduce(x))
        return to_mindspore(summed.chunk(self.size)[self.rank].clone())

    def all_to_all(self, x: Tensor) -> Tensor:
        _, shared = _shared(x)
        received = torch.empty_like(shared)
        if shared.numel():
            dist.all_to_all_single(received, shared, group=self.process_group)
        return to_mindspore(received)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        x, shared = _shared(x)
        if shared.numel():
            dist.broadcast(shared, group=self.process_group, group_src=source)
        return x

    def barrier(self) -> None:
        dist.barrier(self.process_group)


def _shared(x: Tensor) -> tuple[Tensor, torch.Tensor]:
    """`x`, contiguous, and torch's tensor over the same memory."""
    x = x if x.is_contiguous() else x.contiguous()
    return x, to_torch(x)


# vLLM's short names of its groups.
_NAMES = {"tp": "tensor parallel", "pp": "pipeline parallel", "dp": "data parallel", "ep": "expert parallel"}

_made: WeakKeyDictionary[GroupCoordinator, Group] = WeakKeyDictionary()


def make_group(coordinator: GroupCoordinator) -> Group:
    """The ranks of one of vLLM's groups, by the quickest way there is; each of them calls this. Made once."""
    if coordinator.world_size == 1:
        return Group()
    if coordinator not in _made and kernels.get().own_memory:
        name = mint.distributed.new_group(list(coordinator.ranks))
        kind = GraphGroup if kernels.get().compiled else DeviceGroup
        _made[coordinator] = kind(coordinator.rank_in_group, coordinator.world_size, name)
    if coordinator not in _made:
        general = TorchGroup(coordinator.rank_in_group, coordinator.world_size, coordinator.device_group)
        name = coordinator.unique_name.split(":")[0]
        active = kernels.get()
        functions = active.collectives if isinstance(active, CpuKernels) else None
        exchange = partial(_everyones, process_group=coordinator.cpu_group)
        _made[coordinator] = share_memory(general, _NAMES.get(name, name), functions, exchange)
    return _made[coordinator]


def join_devices(torch_meeting: str) -> None:
    """Let this process's device be one of those of all ranks, by HCCL; every rank calls it. Not run on hardware.

    MindSpore's processes meet at a port of the address at which torch's have met, which is the first rank's.
    """
    world = get_world_group()
    if world.world_size == 1:
        return
    host = urlsplit(torch_meeting).hostname or get_loopback_ip()  # a file: all are on one host
    host = f"[{host}]" if ":" in host else host
    meeting = f"tcp://{host}:{get_open_port()}" if world.rank_in_group == 0 else None
    mint.distributed.init_process_group(
        "hccl", init_method=world.broadcast_object(meeting), world_size=world.world_size, rank=world.rank_in_group
    )


def _everyones(value: Any, process_group: dist.ProcessGroup) -> list[Any]:
    """What every rank gave, by rank."""
    values = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(values, value, process_group)
    return values


@dataclass(frozen=True)
class Place:
    """A rank's numbers among those that share a layer, the stages of a pipeline, and the data-parallel ones."""

    tensor: int = 0
    stage: int = 0
    data: int = 0


_planned: Place | None = None


@contextmanager
def planning(place: Place) -> Iterator[None]:
    """Models built in this context are those of the rank at `place`, and cannot run.

    No group of vLLM's is needed: `vllm-ms doctor` asks what a rank would load.
    """
    global _planned
    _planned = place
    try:
        yield
    finally:
        _planned = None


def data_parallel_group(config: ParallelConfig) -> Group:
    """As `tensor_parallel_group`."""
    return make_group(get_dp_group()) if _planned is None else Group(_planned.data, config.data_parallel_size)


def tensor_parallel_group(config: ParallelConfig) -> Group:
    """That of this process, once vLLM has set up its groups."""
    if _planned is not None:
        return Group(_planned.tensor, config.tensor_parallel_size)
    return Group() if config.tensor_parallel_size == 1 else make_group(get_tp_group())


def pipeline_stage(config: ParallelConfig, num_layers: int) -> Stage:
    """That of this process, with its share of a model's layers: vLLM's, or of VLLM_PP_LAYER_PARTITION."""
    if config.pipeline_parallel_size == 1:
        return Stage()
    rank = get_pp_group().rank_in_group if _planned is None else _planned.stage
    own = get_pp_indices(num_layers, rank, config.pipeline_parallel_size)
    return Stage(rank, config.pipeline_parallel_size, range(*own))
