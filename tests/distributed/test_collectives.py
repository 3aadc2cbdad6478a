"""The collectives of processes, and how a host's CPUs are divided among them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed.rank_process import launch
from vllm_ms_models import cores
from vllm_ms_models.distributed.group import Group


def test_collectives_between_processes(tmp_path: Path) -> None:
    """Three ranks, each a process of its own that compares with torch (collective_rank.py)."""
    ranks = launch("collective_rank", 3, tmp_path)
    for rank, process in enumerate(ranks):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-4000:]
        assert f"rank {rank} is done" in output


def test_one_rank_needs_no_other() -> None:
    group, x = Group(), object()
    for collective in (group.all_reduce, group.all_gather, group.reduce_scatter, group.all_to_all, group.broadcast):
        assert collective(x) is x
    group.barrier()
    with pytest.raises(NotImplementedError, match="Group of 2 ranks has no way"):
        Group(0, 2).barrier()


@given(st.lists(st.integers(0, 500), min_size=1, max_size=70, unique=True), st.integers(1, 9))
def test_cpus_are_divided(cpus: list[int], ranks: int) -> None:
    parts = [cores.share(cpus, rank, ranks) for rank in range(ranks)]
    if ranks <= len(cpus):
        assert [cpu for part in parts for cpu in part] == cpus
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    else:
        assert all(len(part) == 1 for part in parts)
        counts = [sum(part == [cpu] for part in parts) for cpu in cpus]
        assert max(counts) - min(counts) <= 1


def test_threads_of_a_core_stay_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sockets of two cores of two threads, numbered as Linux usually does."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}"
        (folder / "topology").mkdir(parents=True)
        (folder / f"node{cpu % 4 // 2}").mkdir()
        (folder / "topology" / "physical_package_id").write_text(f"{cpu % 4 // 2}\n")
        (folder / "topology" / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(cores, "_CPUS", tmp_path)
    assert cores.neighbours_first(range(8)) == [0, 4, 1, 5, 2, 6, 3, 7]
    monkeypatch.setattr(cores, "_CPUS", tmp_path / "nothing is known")
    assert cores.neighbours_first([3, 1, 2]) == [1, 2, 3]


BOUND = """
import os, threading
from tests.distributed.rank_process import launch
from vllm_ms_models import cores
waits = threading.Event()
before = threading.Thread(target=waits.wait, daemon=True)
before.start()
wanted = cores.bind(0, 64)
masks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
print(len(wanted), all(mask == set(wanted) for mask in masks), len(masks) > 1)
"""


def test_all_threads_are_bound() -> None:
    """With so many ranks each has one CPU or a few; threads that run already move there too."""
    run = subprocess.run([sys.executable, "-c", BOUND], capture_output=True, text=True, check=True)
    count = max(1, len(os.sched_getaffinity(0)) // 64)
    assert run.stdout.split() == [str(count), "True", "True"]
