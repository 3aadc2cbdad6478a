"""Processes that outlive the program which started them; a program that leads a session is known by that."""

import contextlib
import os
import time
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def none_left(seconds: float = 20) -> Iterator[list[int]]:
    """The block appends leaders of sessions: AssertionError if a process of theirs is there `seconds` after the block.

    Such processes are killed, and those of a block that fails at once.
    """
    sessions: list[int] = []
    try:
        yield sessions
        end = time.monotonic() + seconds
        while (found := _processes_of(sessions)) and time.monotonic() < end:
            time.sleep(0.2)
        assert not found, f"left behind: {found}"
    finally:
        for process in _processes_of(sessions):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _processes_of(sessions: list[int]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
