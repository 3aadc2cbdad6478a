"""Processes of engines: each leads a group of its own, which can be paused, and ends with us in any case."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Group:
    """A command as leader of a new session; a context manager that kills the whole group at its end."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path, pipes: bool = False) -> None:
        self.log = log
        self.spawned = time.time()
        with log.open("ab") as output:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                list(command),
                env=dict(env),
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else output,
                stderr=output,
                text=True,
                cwd=log.parent,  # `python -m` would look for packages, and their plug-ins, in the present folder
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    @contextlib.contextmanager
    def on_turn(self) -> Iterator[None]:
        """Running for the time of the block, paused before and after."""
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def stop(self, seconds: float = 30) -> None:
        """Ask to end (SIGTERM), then kill."""
        self.resume()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def last_words(self, lines: int = 1) -> str:
        """The end of what it printed."""
        return " / ".join(self.log.read_text(errors="replace").strip().splitlines()[-lines:])

    def tree(self) -> list[psutil.Process]:
        """The process and all its descendants that are alive."""
        try:
            leader = psutil.Process(self.process.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory(self) -> int:
        """Bytes of memory of the whole tree, shared pages counted in proportion (PSS)."""
        return sum(_pss(process.pid) for process in self.tree())

    def cpu_seconds(self) -> float:
        """CPU time that the tree has used so far."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


def _pss(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


@contextlib.contextmanager
def sampled_memory(group: Group, every: float = 0.3) -> Iterator[dict[str, Any]]:
    """`{"peak_bytes": ...}` of `group`, sampled in a thread during the block; not for timed work."""
    import threading

    result: dict[str, Any] = {"peak_bytes": 0}
    done = threading.Event()

    def sample() -> None:
        while True:
            result["peak_bytes"] = max(result["peak_bytes"], group.memory())
            if done.wait(every):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def watched(group: Group) -> Iterator[dict[str, float]]:
    """`{"foreign_cpus": ...}`: CPUs that others (or the host of this machine) used during the block, on average."""
    result = {"foreign_cpus": 0.0}
    start, busy, own = time.monotonic(), _busy_seconds(), group.cpu_seconds()
    yield result
    passed = time.monotonic() - start
    used = _busy_seconds() - busy - (group.cpu_seconds() - own)
    result["foreign_cpus"] = round(max(0.0, used / passed), 3)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def pipe(group: Group) -> tuple[IO[str], IO[str]]:
    """Standard input and output of a group made with pipes."""
    assert group.process.stdin is not None and group.process.stdout is not None
    return group.process.stdin, group.process.stdout
