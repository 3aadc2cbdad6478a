"""Processes that outlive the program which started them: found by a variable that they all inherit, and ended."""

import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping

import psutil

_VARIABLE = "STARTED_BY_TEST"


@contextlib.contextmanager
def none_left(variables: Mapping[str, str], seconds: float = 20) -> Iterator[dict[str, str]]:
    """`variables` and one more for a program that the block starts: AssertionError if a process with it is still there
    `seconds` after the block; it is killed. A block that fails has its processes killed at once.
    """
    mark = secrets.token_hex(8)
    try:
        yield {**variables, _VARIABLE: mark}
        end = time.monotonic() + seconds
        while (found := _marked(mark)) and time.monotonic() < end:
            time.sleep(0.2)
        assert not found, f"left behind: {found}"
    finally:
        for process in _marked(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(_VARIABLE) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
