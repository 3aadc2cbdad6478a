"""The process that operators run in, seen from outside, where there is no MindSpore: a fault ends the process."""

import json
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass

MARK = "selfcheck:"  # before each line of the process that is meant for this side; libraries print there, too


@dataclass(frozen=True)
class Line:
    """What became of one operator in one dtype; `status` is empty while it runs."""

    name: str
    dtype: str
    status: str = ""
    detail: str = ""
    planned: int = 1  # how many lines there are in all

    def __str__(self) -> str:
        return f"{self.status:<20}{self.name}, {self.dtype}{self.detail and ': '}{self.detail}"

    def say(self) -> None:
        """To the other side of the pipe."""
        print(MARK + json.dumps(vars(self)), flush=True)


class Process:
    """Runs the checks from number `first` on; ended with the context."""

    def __init__(self, device: str, only: str, first: int) -> None:
        module = "vllm_ms_models.kernels.ascend.selfcheck"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--device", device, "--only", only, "--from", str(first)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said = ""
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            self._lines.put(text)
        self._lines.put(None)

    def answer(self, seconds: float) -> Line | str:
        """The next line, or why there is none."""
        while True:
            try:
                text = self._lines.get(timeout=seconds)
            except queue.Empty:
                return f"no answer within {seconds:g} s"
            if text is None:
                return f"the process ended with {self._process.wait()}: {self._said}"
            if text.startswith(MARK):
                return Line(**json.loads(text[len(MARK) :]))
            self._said = text.strip() or self._said
