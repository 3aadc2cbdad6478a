"""Real servers for tests: `vllm serve` as a user runs it, on the loopback address and a free port."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

DEMO = Path(__file__).parents[1] / "examples" / "demo" / "checkpoint"
VLLM = str(Path(sys.executable).with_name("vllm"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Server:
    """A running server; `log` is everything it has printed."""

    process: subprocess.Popen[bytes]
    port: int
    log_file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120, max_retries=0)


def _wait_healthy(server: Server, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise AssertionError(f"vllm serve ended with {server.process.returncode}:\n{server.log[-6000:]}")
        try:
            if httpx.get(f"{server.url}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise AssertionError(f"vllm serve is not healthy after {seconds} s:\n{server.log[-6000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's whole process group (it is its own session)."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@contextmanager
def started(*arguments: str, port: int = 0, env: dict[str, str] | None = None) -> Iterator[Server]:
    """`vllm serve arguments...`, whatever becomes of it; ended on exit."""
    # An engine in this process has set the variable; the server is to choose by itself.
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_WORKER_MULTIPROC_METHOD"}
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [VLLM, "serve", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited, **(env or {})},
                start_new_session=True,
            )
        try:
            yield Server(process, port, log_file)
        finally:
            _stop(process)


@contextmanager
def serve(
    model: str | Path, *arguments: str, env: dict[str, str] | None = None, seconds: float = 180
) -> Iterator[Server]:
    """`vllm serve model arguments...`, healthy; ended on exit."""
    port = free_port()
    with started(str(model), "--host", "127.0.0.1", "--port", str(port), *arguments, port=port, env=env) as server:
        _wait_healthy(server, seconds)
        yield server
