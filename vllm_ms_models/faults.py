"""When a process of a server dies, the others end too, and the server says so. No MindSpore here.

vLLM's workers see their engine's end, and its front ends those of engines. What it leaves to do: engines, coordinators
and front ends that were spawned outlive a parent that is killed; a server of one front end whose engine has died ends
as if nothing had happened, with the exit code 0; and an engine that is killed takes along the process that would have
removed its named shared memory.
"""

import atexit
import functools
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from multiprocessing import resource_tracker

logger = logging.getLogger("vllm.ms_models")

GRACE = 5.0  # seconds to end in an orderly way
_INTERVAL = 0.5  # seconds between looks at the parent
_VLLM_PROCESSES = re.compile(r"EngineCore(_DP\d+)?|VllmWorker-\d+|ApiServer_\d+|VLLM_DP_Coordinator")
_FRONT_END = "vllm.v1.engine.async_llm"  # logs an EngineDeadError when its engine has died


@functools.cache
def end_with_parent() -> None:
    """In a process that vLLM has spawned: end soon after the one that started it; in any other, do nothing.

    Called while modules are imported, when `multiprocessing.parent_process` is not known yet. Forks are ended by the
    kernel (processes.py).
    """
    if _VLLM_PROCESSES.fullmatch(multiprocessing.current_process().name):
        threading.Thread(target=_end_after, args=(os.getppid(),), name="EndWithParent", daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_INTERVAL)
    name = multiprocessing.current_process().name
    logger.error("Process %s, which started %s, has ended without stopping it; %s ends too.", parent, name, name)
    end_process()


def end_process() -> None:
    """End this process in an orderly way or, if that takes too long, at once. Not called from its main thread."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


@functools.cache
def prepare_command() -> None:
    """In the first process of a command: if an engine or worker dies, say so, and end with the exit code 1.

    Python's resource tracker, which removes named shared memory once all that use it have ended, is started here: the
    engine would start its own, and vLLM, which kills a busy engine with all processes that it has started, that too.
    """
    if multiprocessing.parent_process() is None:
        resource_tracker.ensure_running()
        if "--headless" in sys.argv:
            _fail_unless_stopped()
        else:
            watcher = _EngineDeath()
            logging.getLogger(_FRONT_END).addHandler(watcher)
            atexit.register(watcher.fail)


class _EngineDeath(logging.Handler):
    """Notices vLLM's report of a dead engine."""

    seen = False

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0] if record.exc_info else None
        if kind is not None and kind.__name__ == "EngineDeadError" and not self.seen:
            self.seen = True
            logger.error(
                "An engine process has died, so this server ends; the errors above say which and why, or, if it was "
                "killed, the kernel's log (out of memory?)."
            )

    def fail(self) -> None:
        if self.seen:
            _fail()


def _fail_unless_stopped() -> None:
    """In a command without a front end, which works until it gets a signal: ending without one is a failure."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing)  # Python writes the number of each signal there; nothing else here asks for them

    def check() -> None:
        try:
            stopped = {signal.SIGTERM, signal.SIGINT}.intersection(os.read(reading, 1000))
        except BlockingIOError:
            stopped = set()
        if not stopped:
            logger.error("A process of this host's part of the server has died, so the others here end, too.")
            _fail()

    atexit.register(check)


def _fail() -> None:
    """End this process, whose children have ended, with an exit code that tells."""
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
