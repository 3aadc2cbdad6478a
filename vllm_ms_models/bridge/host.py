"""The memory of this host, or of its container, and what the ranks on it agree on. No MindSpore here."""

from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import get_world_group
from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit, get_cgroup_memory_usage

from vllm_ms_models.memory import HostMemory

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


def over_all(value: int, operation: dist.ReduceOp.RedOpType) -> int:
    """Of every rank's `value`; all ranks call it. The value itself without other ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    shared = torch.tensor([value])
    dist.all_reduce(shared, operation, get_world_group().cpu_group)
    return int(shared)
