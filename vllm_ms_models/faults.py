"""When a process of a server dies, the others end too, and the server says so. No MindSpore here.

vLLM's workers see their engine's end, and its front ends those of engines. What it leaves to do: engines, coordinators
and front ends that were spawned outlive a parent that is killed; and a server of one front end whose engine has died
ends as if nothing had happened, with the exit code 0.
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

logger = logging.getLogger("vllm.ms_models")

GRACE = 5.0  # seconds to end in an orderly way
_INTERVAL = 0.5  # seconds between looks at the parent
_VLLM_PROCESSES = re.compile(r"EngineCore(_DP\d+)?|VllmWorker-\d+|ApiServer_\d+|VLLM_DP_Coordinator")
_FRONT_END = "vllm.v1.engine.async_llm"  # logs an EngineDeadError when its engine has died


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
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


@functools.cache
def fail_with_engine() -> None:
    """In the first process of a command: if the engine dies, say so, and end with the exit code 1."""
    if multiprocessing.parent_process() is None:
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
        """End this process, whose children have ended, with an exit code that tells."""
        if self.seen:
            for child in multiprocessing.active_children():
                child.kill()
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
