"""The engines as worker processes: started once, asked in turns, paused while others are asked."""

import json
import os
import selectors
import time
from pathlib import Path
from typing import Any

from benchmarks import cases, peers
from benchmarks.models import CONFIGS, checkpoint, split
from benchmarks.processes import Group, pipe


class EngineError(RuntimeError):
    """An engine could not start, or could not do a case; the message is its own."""


def vllm_options(model: str) -> dict[str, Any]:
    """Options of `LLM`, the same for all engines of vLLM."""
    longest = CONFIGS[split(model)[0]]["max_position_embeddings"]
    return {
        "dtype": "bfloat16",
        "max_model_len": min(cases.MAX_MODEL_LEN, longest),
        "max_num_batched_tokens": cases.OFFLINE_BATCHED_TOKENS,
        "max_num_seqs": 32,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": 0,
    }


def _command(name: str, model: str) -> list[str]:
    threads = str(len(os.sched_getaffinity(0)))
    spawned = repr(time.time())
    folder = str(checkpoint(model))
    arguments = {
        peers.LLAMA_CPP: lambda: ["llamacpp.py", str(peers.gguf(model)), spawned, threads],
        peers.TRANSFORMERS: lambda: ["transformers_model.py", folder, spawned, threads],
    }.get(name, lambda: ["vllm_engine.py", folder, spawned, json.dumps(vllm_options(model))])()
    return [str(peers.python(name)), str(peers.WORKERS / arguments[0]), *arguments[1:]]


class Worker(Group):
    """One engine with one model. Every method waits for the answer; EngineError if it is an error or there is none."""

    def __init__(self, name: str, model: str, logs: Path) -> None:
        env = peers.environment(name, cases.KV_GIB) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        super().__init__(_command(name, model), env, logs / f"{model}-{name}.log", pipes=True)
        self.name = name
        self.about: dict[str, Any] = {}

    def wait_ready(self, seconds: float = 600) -> None:
        """Until it is loaded and has yielded a first token; what it says of itself is then in `about`."""
        self.about = self._answer(seconds)["ready"]
        if self.name == peers.ZENTORCH and self.about["platform"] != "ZenCpuPlatform":
            raise EngineError("vLLM does not use zentorch on this CPU (it is for AMD CPUs with AVX-512).")

    def ask(self, do: str, seconds: float = 1200, **values: Any) -> dict[str, Any]:
        to_worker, _ = pipe(self)
        try:
            to_worker.write(json.dumps({"do": do, **values}) + "\n")
            to_worker.flush()
        except OSError:
            raise EngineError(f"it has ended: {self.last_words()}") from None
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        _, from_worker = pipe(self)
        with selectors.DefaultSelector() as selector:
            selector.register(from_worker, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise EngineError(f"no answer within {seconds:.0f} s")
        line = from_worker.readline()
        if not line:
            raise EngineError(f"it has ended: {self.last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer
