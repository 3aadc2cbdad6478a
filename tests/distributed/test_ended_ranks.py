"""Ranks that share memory: one ends, is stopped, or is told to end within a collective; the others notice or wait."""

import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.rank_process import launch

NOTICED = 2.0  # seconds: they look after each other ten times a second, this machine may be busy
PATIENCE = 120  # seconds, after which a process that says nothing is killed


def line_of(process: subprocess.Popen[str], wanted: str) -> str:
    """The next line that has `wanted` in it; how it ends after that, and how long that takes, is not looked at."""
    assert process.stdout
    said = [""]
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    while wanted not in said[-1]:
        said.append(process.stdout.readline())
        assert said[-1], "".join(said)
    watchdog.cancel()
    return said[-1]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Three, which are at it."""
    processes = launch("ended_rank", 3, tmp_path)
    try:
        for process in processes:
            line_of(process, "begins")
        time.sleep(0.2)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def check_noticed(process: subprocess.Popen[str], begin: float, what: str) -> int:
    """That it raised in time, and would again; how many sums it had by then."""
    when, count, sentence = line_of(process, "Rank").split(" ", 2)
    assert float(when) - begin < NOTICED
    error = f"Rank {what}; see what it says above, and start the server again."
    assert re.fullmatch(f"{error} \\| The tensor parallel group cannot go on: {error}\n", sentence), sentence
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
    assert float(line_of(ranks[2], "leaves").split()[0]) - begin < NOTICED
    ranks[2].kill()  # if it is not gone yet
    begin = time.monotonic()
    ranks[0].send_signal(signal.SIGCONT)
    check_noticed(ranks[0], begin, "2 of the tensor parallel group has (ended|given up)")
