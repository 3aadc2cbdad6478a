"""Collectives of ranks on one host, through memory that they share.

The memory has no name: rank 0 makes it (memfd_create), the others open it by its descriptor in /proc, and it goes with
the last process that maps it. What happens in there is C++ (kernels/cpu/ranks.cpp, collectives.cpp).
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mindspore import Tensor

from vllm_ms_models.distributed.group import Group

logger = logging.getLogger("vllm.ms_models")

_TOKEN_BYTES = 16


@dataclass(frozen=True)
class SharedMemoryGroup(Group):
    """Ranks that share memory.

    Sums of floats are added in float32, in the order of ranks, and rounded once. Tensors are of float32, bfloat16,
    float16, int32, int64 or int8; `general` does others. `all_reduce` and `broadcast` change `x` and return it.

    Raises (all collectives): RuntimeError, if another rank has ended or gave up, or is at another collective; what a
    Python signal handler raises while others let this rank wait. After either, the group is of no use.
    """

    functions: Any = field(default=None, repr=False)  # CpuKernels.collectives
    ranks: Any = field(default=None, repr=False)  # this process's place among them, in C++
    general: Group = field(default_factory=Group)

    def all_reduce(self, x: Tensor) -> Tensor:
        result = self.functions.all_reduce(self.ranks, x)
        return self._odd("all_reduce", x) if result is None else result

    def all_gather(self, x: Tensor) -> Tensor:
        result = self.functions.all_gather(self.ranks, x)
        return self._odd("all_gather", x) if result is None else result

    def reduce_scatter(self, x: Tensor) -> Tensor:
        result = self.functions.reduce_scatter(self.ranks, x)
        return self._odd("reduce_scatter", x) if result is None else result

    def all_to_all(self, x: Tensor) -> Tensor:
        result = self.functions.all_to_all(self.ranks, x)
        return self._odd("all_to_all", x) if result is None else result

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        result = self.functions.broadcast(self.ranks, x, source)
        return self._odd("broadcast", x, source) if result is None else result

    def barrier(self) -> None:
        self.functions.barrier(self.ranks)

    def _odd(self, collective: str, x: Tensor, *arguments: int) -> Tensor:
        """What the functions have left alone: it is made contiguous, or has a dtype that they do not know."""
        group = self.general if x.is_contiguous() else self
        return getattr(group, collective)(x if x.is_contiguous() else x.contiguous(), *arguments)


@dataclass(frozen=True)
class _Place:
    """What the others must know of a rank."""

    host: str  # the running system, and how it numbers this rank's processes
    process: int
    cpus: frozenset[int]
    memory: tuple[int, int] = (-1, 0)  # descriptor and bytes, of rank 0
    token: bytes = b""  # what is behind these bytes, of rank 0


def share_memory(general: Group, name: str, functions: Any, exchange: Callable[[Any], list[Any]]) -> Group:
    """A group of the ranks of `general`, or `general` itself where they cannot share memory, which rank 0 logs.

    All ranks call it. `name` is the group's in sentences ("tensor parallel"); `functions` are `CpuKernels.collectives`,
    or None where the kernels are others; `exchange` returns every rank's (picklable) argument by rank.
    """
    with ExitStack() as until_joined:
        ranks = None
        try:
            places = exchange(_place(general, functions, until_joined))
            ranks = _join(general.rank, places, name, functions)
            fault = ""
        except (OSError, ValueError) as error:
            fault = str(error)
        faults = [fault for fault in exchange(fault) if fault]
    if not faults:
        return SharedMemoryGroup(general.rank, general.size, functions, ranks, general)
    if general.rank == 0:
        logger.info("The ranks of the %s group do not share memory and send messages: %s", name, faults[0])
    return general


def _place(group: Group, functions: Any, until_joined: ExitStack) -> _Place | str:
    """This rank's, or why it cannot share memory."""
    try:
        if functions is None:
            return "the kernels are not the C++ ones."
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(os.readlink("/proc/self/ns/pid"))
        place = _Place(host, os.getpid(), frozenset(os.sched_getaffinity(0)))
        if group.rank > 0:
            return place
        memory, size = functions.new_shared_memory(group.size)
        until_joined.callback(os.close, memory)
        token = os.urandom(_TOKEN_BYTES)
        os.pwrite(memory, token, size)
        return replace(place, memory=(memory, size), token=token)
    except (OSError, ValueError) as error:
        return str(error)


def _join(rank: int, places: Sequence[_Place | str], name: str, functions: Any) -> Any:
    """This rank's way to the memory and to the others. Raises OSError or ValueError."""
    known = [place for place in places if isinstance(place, _Place)]
    if len(known) < len(places):
        raise ValueError(next(place for place in places if isinstance(place, str)))
    first = known[0]
    if any(place.host != first.host for place in known):
        raise ValueError("they are on several hosts, or in containers that do not see each other.")
    cpus = frozenset[int]().union(*(place.cpus for place in known))
    descriptor, size = first.memory
    memory = os.open(f"/proc/{first.process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(memory, _TOKEN_BYTES, size) != first.token:
            raise ValueError(f"process {first.process} is not rank 0 here.")
        processes = tuple(place.process for place in known)
        return functions.join_ranks(memory, rank, processes, len(known) > len(cpus), name)
    finally:
        os.close(memory)
