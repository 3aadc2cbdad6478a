"""The memory of this host, or of its container, and what the ranks on it agree on. No MindSpore here."""

import functools
import os
import socket
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from vllm.config import ParallelConfig
from vllm.distributed.parallel_state import get_world_group
from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit, get_cgroup_memory_usage

from vllm_ms_models.memory import HostMemory

# The number of ranks on this host, all engines together, which the platform sets for the processes to come.
RANKS_VARIABLE = "LOCAL_WORLD_SIZE"

# Version 2 and version 1 of control groups.
_STATISTICS = (Path("/sys/fs/cgroup/memory.stat"), Path("/sys/fs/cgroup/memory/memory.stat"))


def host_memory() -> HostMemory:
    """All NUMA nodes together; in a container with a limit, what the limit leaves.

    Pages that only cache files, such as a checkpoint just read, count as available: the kernel takes them back.
    """
    memory = psutil.virtual_memory()
    limit, used = get_cgroup_memory_limit(), get_cgroup_memory_usage()
    if limit is None or used is None or limit >= memory.total:
        return HostMemory(memory.total, memory.available)
    return HostMemory(limit, min(memory.available, limit - used + _file_cache()))


def _file_cache() -> int:
    """Bytes of the container's page cache."""
    for path in _STATISTICS:
        if path.exists():
            lines = dict(line.split() for line in path.read_text().splitlines())
            return int(lines.get("inactive_file", 0)) + int(lines.get("active_file", 0))
    return 0


def over_host(value: int) -> list[int]:
    """The `value` of every rank on this host, which all ranks call for; with one process, its own."""
    return [number for host, number in everyone(value) if host == _identity()]


def place(parallel: ParallelConfig) -> tuple[int, int]:
    """This rank's number among those on this host that serve together, and how many they are. All ranks call it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    here = over_host(rank)
    engines = independent_engines(parallel)
    number = (parallel.data_parallel_rank_local or 0) if engines > 1 else 0
    return number * len(here) + here.index(rank), engines * len(here)


def independent_engines(parallel: ParallelConfig) -> int:
    """How many engines on this host know nothing of each other: data parallelism, unless experts tie them together."""
    if parallel.data_parallel_size > 1:
        return 1
    return max(1, int(os.environ.get(RANKS_VARIABLE, 1)) // parallel.local_world_size)


def everyone(value: Any) -> list[tuple[str, Any]]:
    """Host and `value` of every rank, in their order. All ranks call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [(_identity(), value)]
    values: list[tuple[str, Any]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(values, (_identity(), value), get_world_group().cpu_group)
    return values


@functools.cache
def _identity() -> str:
    """The same for processes that share this host's (or container's) memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
