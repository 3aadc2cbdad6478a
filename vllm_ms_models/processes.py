"""How vLLM is to start its other processes, the engine's above all."""

import ctypes
import functools
import gc
import os
import signal
import sys
import threading
from pathlib import Path

VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"
_PR_SET_PDEATHSIG = 1


def start_method() -> str:
    """`fork` where that is known to be safe, else `spawn`; what the user set counts unless it cannot work.

    A fork need not import everything once more, which takes ten seconds, and shares the imported modules' memory,
    some 400 MiB. But it has locks and thread pools without the threads behind them: never once MindSpore is loaded,
    and not in a program that has run torch, whose OpenMP threads a fork waits for in vain. vLLM's own commands are
    known to have run neither.
    """
    if "mindspore" in sys.modules or threading.active_count() > 1:
        return "spawn"
    command = is_vllm_command()
    method = _set_by_user() or ("fork" if command and sys.platform.startswith("linux") else "spawn")
    if command and method == "fork":
        _prepare_forks()
    return method


def _set_by_user() -> str | None:
    """The variable as this process was started with: vLLM's commands set it to `spawn` when it is not there."""
    try:
        variables = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ.get(VARIABLE)
    start = f"{VARIABLE}=".encode()
    return next((entry[len(start) :].decode() for entry in variables if entry.startswith(start)), None)


def is_vllm_command() -> bool:
    """Whether this process is `vllm ...` or `python -m vllm....`."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = spec.name if spec else Path(getattr(main, "__file__", None) or "").name
    return name.split(".")[0] == "vllm"


@functools.cache
def _prepare_forks() -> None:
    """Keep what is imported shared, and let no fork outlive its parent: it has the server's listening socket too."""
    os.register_at_fork(before=_freeze, after_in_child=_live_alone)


def _freeze() -> None:
    """Garbage collections would write to, and so copy, every page that holds an object."""
    gc.collect()
    gc.freeze()


def _live_alone() -> None:
    """End with the parent, and keep signals to oneself: the parent's event loop would take them for its own."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
