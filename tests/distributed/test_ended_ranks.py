"""Ranks that share memory: one ends, is stopped, or is told to end within a collective; the others notice or wait."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.rank_process import launch

NOTICED = 2.0  # seconds: they look after each other ten times a second, this machine may be busy


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Three, which are at it."""
    processes = launch("ended_rank", 3, tmp_path)
    for process in processes:
        assert process.stdout
        said = [process.stdout.readline()]
        while said[-1] and said[-1] != "begins\n":
            said.append(process.stdout.readline())
        assert said[-1] == "begins\n", "".join(said)
    time.sleep(0.2)
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def check_noticed(process: subprocess.Popen[str], begin: float, what: str) -> int:
    """That it raised in time, and would again; how many sums it had by then."""
    output, _ = process.communicate(timeout=60)
    when, count, sentence = output.splitlines()[-1].split(" ", 2)
    assert float(when) - begin < NOTICED
    assert sentence.startswith(f"Rank {what}; see what it says above, and start the server again. | The tensor ")
    assert process.returncode == 0
    return int(count)


def test_a_killed_rank_is_noticed(ranks: list[subprocess.Popen[str]]) -> None:
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    ranks[1].send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert all(process.poll() is None for process in ranks)  # a slow one is waited for
    begin = time.monotonic()
    ranks[1].kill()  # and nobody waits for it: it is a zombie
    counts = [check_noticed(ranks[rank], begin, "1 of the tensor parallel group has ended") for rank in (0, 2)]
    assert min(counts) > 0 and max(counts) - min(counts) <= 1


def test_a_rank_that_is_told_to_end_ends(ranks: list[subprocess.Popen[str]]) -> None:
    """Although it waits for another, which does not come."""
    ranks[0].send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    begin = time.monotonic()
    ranks[2].send_signal(signal.SIGTERM)
    output, _ = ranks[2].communicate(timeout=60)
    assert output.endswith(" leaves\n") and float(output.split()[-2]) - begin < NOTICED
    begin = time.monotonic()
    ranks[0].send_signal(signal.SIGCONT)
    check_noticed(ranks[0], begin, "2 of the tensor parallel group has ended")
