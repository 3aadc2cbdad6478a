"""A server stopped while it answers: vLLM kills its engine, and waits for the answers for ever. No MindSpore here."""

import logging
import sys
from types import FrameType

_LAUNCHER = "vllm.entrypoints.launchers.launcher"  # logs, to the user or not, that a front end has stopped its engine
_STOPPED = "engine client stopped"


def end_requests_with_engine() -> None:
    """In a front end: when it is stopped, tell the requests that still wait for the engine, which has ended by then."""
    launcher = logging.getLogger(_LAUNCHER)
    launcher.setLevel(logging.INFO)  # what is printed is the choice of vLLM's handler
    if _end_requests not in launcher.filters:
        launcher.addFilter(_end_requests)  # a handler would be gone when vLLM configures its loggers once more


def _end_requests(record: logging.LogRecord) -> bool:
    """Notices vLLM's report that the engine was stopped, made by the function that has the engine's client."""
    if _STOPPED in record.getMessage():
        frame: FrameType | None = sys._getframe()
        while frame is not None and "engine_client" not in frame.f_locals:
            frame = frame.f_back
        processor = getattr(frame and frame.f_locals["engine_client"], "output_processor", None)
        if processor is not None:
            from vllm.v1.engine.exceptions import EngineDeadError

            class ServerStoppedError(EngineDeadError):
                def __str__(self) -> str:
                    return "The server is stopping and has not finished this request; send it again later."

            processor.propagate_error(ServerStoppedError())
    return True
