"""Which CPUs a rank runs on: those of the process's affinity mask, divided among the ranks of a host."""

import os
from collections.abc import Sequence
from pathlib import Path

# Only Ray's actors that are ranks have it: OMP_NUM_THREADS as the user set it, or nothing.
RAY_RANK = "RAY_RANK_OMP_NUM_THREADS"

_CPUS = Path("/sys/devices/system/cpu")


def share(cpus: Sequence[int], rank: int, ranks: int) -> list[int]:
    """The part of `cpus` that is number `rank` of `ranks`: neighbours, none in two parts, sizes differ by one at most.

    With more ranks than CPUs each has one, which others have too.
    """
    if ranks > len(cpus):
        return [cpus[rank % len(cpus)]]
    return list(cpus[rank * len(cpus) // ranks : (rank + 1) * len(cpus) // ranks])


def neighbours_first(cpus: Sequence[int]) -> list[int]:
    """Ordered so that hardware threads of a core, cores of a cache and those of a NUMA node lie together."""
    return sorted(cpus, key=lambda cpu: (_node(cpu), _topology(cpu, "physical_package_id"), _core(cpu), cpu))


def bind(rank: int, ranks: int) -> list[int]:
    """Let all threads of this process, and those that it will start, run on its share of the CPUs alone."""
    cpus = share(neighbours_first(sorted(os.sched_getaffinity(0))), rank, ranks)
    for task in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(task), cpus)
        except ProcessLookupError:  # it has ended meanwhile
            continue
    return cpus


def restore_thread_limit() -> None:
    """Take back Ray's OMP_NUM_THREADS=1 before the kernels start: the user's limit counts, or the rank's CPUs."""
    given = os.environ.get(RAY_RANK)
    if given:
        os.environ["OMP_NUM_THREADS"] = given
    elif given is not None:
        os.environ.pop("OMP_NUM_THREADS", None)


def _node(cpu: int) -> int:
    """Its NUMA node; 0 where the system does not tell."""
    nodes = [int(path.name[4:]) for path in (_CPUS / f"cpu{cpu}").glob("node[0-9]*")]
    return min(nodes, default=0)


def _core(cpu: int) -> int:
    """The lowest CPU of the same core."""
    try:
        siblings = (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
        return int(siblings.replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return cpu


def _topology(cpu: int, name: str) -> int:
    try:
        return int((_CPUS / f"cpu{cpu}" / "topology" / name).read_text())
    except (OSError, ValueError):
        return 0
