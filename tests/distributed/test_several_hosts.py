"""Two `vllm serve`, as on two hosts, that serve one model together: on the loopback address, without Ray."""

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.distributed.faults import LIMIT, OPTIONS, Crowd, model, processes
from tests.distributed.leftovers import none_left
from tests.distributed.rank_models import Model, made
from tests.quantization.comparison import TOKENS, without_ties
from tests.servers import Server, free_port, serve, started

LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
# The options of every `vllm serve` here.
SMALL = ["--dtype", "float32", "--skip-tokenizer-init", "--max-model-len", "64", "--max-num-seqs", "4"]
SMALL += ["--kv-cache-memory-bytes", str(2**25)]

pytestmark = [pytest.mark.slow, pytest.mark.serving]


def on_both(kind: str) -> list[str]:
    """What both hosts are given: one rank each, tensor parallel or data parallel."""
    if kind == "tp2":
        master = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        return ["--tensor-parallel-size", "2", "--nnodes", "2", *master]
    size = ["--data-parallel-size", "2", "--data-parallel-size-local", "1", "--enable-expert-parallel"]
    return [*size, "--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(free_port())]


SECOND = {"tp2": ["--node-rank", "1", "--headless"], "dp2": ["--headless", "--data-parallel-start-rank", "1"]}


def tokens_of(server: Server, folder: Path, prompt: Sequence[int], rank: int | None) -> list[int]:
    body: dict[str, Any] = {"model": str(folder), "prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0}
    body |= {"return_token_ids": True, "ignore_eos": True, "detokenize": False}
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


@pytest.mark.parametrize(("kind", "family"), [("tp2", "qwen2"), ("dp2", "qwen3_moe")])
def test_same_tokens(kind: str, family: str) -> None:
    """Of every rank; neither host leaves a process behind."""
    model = made(family, "float32", 2)
    prompts, answers = without_ties(model.model, model.margin)
    given = [*SMALL, *on_both(kind)]
    with none_left() as sessions, ExitStack() as hosts:
        second = hosts.enter_context(started(str(model.folder), *given, *SECOND[kind], env=LOOPBACK))
        first = hosts.enter_context(serve(model.folder, *given, env=LOOPBACK))
        sessions += [first.process.pid, second.process.pid]
        for rank in (None,) if kind == "tp2" else (0, 1):
            found = [tokens_of(first, model.folder, prompt, rank) for prompt in prompts]
            assert found == [answer.tokens for answer in answers]
        assert second.process.poll() is None, second.log[-4000:]


@pytest.mark.parametrize("kind", ["tp2", "dp2"])
@pytest.mark.parametrize("dies", ["first", "second"])
def test_a_host_that_dies(kind: str, dies: str) -> None:
    """All its processes are killed, while it is answering: the other host's end, with an exit code that tells."""
    folder = str(model("qwen2" if kind == "tp2" else "qwen3_moe"))
    given = [*OPTIONS, *on_both(kind)]
    with none_left(LIMIT) as sessions, ExitStack() as hosts:
        second = hosts.enter_context(started(folder, *given, *SECOND[kind], env=LOOPBACK))
        first = hosts.enter_context(serve(folder, *given, env=LOOPBACK))
        sessions += [first.process.pid, second.process.pid]
        with Crowd(first.url) as crowd:
            crowd.enter(4)
            dead, other = (first, second) if dies == "first" else (second, first)
            start = time.monotonic()
            for process in processes(dead):
                os.kill(process.pid, signal.SIGKILL)
            assert other.process.wait(LIMIT) != 0, other.log[-4000:]
            outcomes = crowd.outcomes(LIMIT)
        assert all(outcome.knows for outcome in outcomes), outcomes
        assert max(outcome.ended for outcome in outcomes) - start < LIMIT


def other_weights(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, file, {"format": "pt"})


def other_config(folder: Path) -> None:
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(entries | {"rms_norm_eps": 0.125}))


@pytest.mark.parametrize("kind", ["tp2", "dp2"])
@pytest.mark.parametrize("change", [other_weights, other_config])
def test_another_checkpoint_on_the_second_host(kind: str, change: Any, tmp_path: Path) -> None:
    model: Model = made("qwen2" if kind == "tp2" else "qwen3_moe", "float32", 2)
    folder = tmp_path / "copy"
    shutil.copytree(model.folder, folder)
    change(folder)
    given = [*SMALL, *on_both(kind)]
    with none_left() as sessions, ExitStack() as hosts:
        port = free_port()
        first = hosts.enter_context(
            started(str(model.folder), *given, "--host", "127.0.0.1", "--port", str(port), env=LOOPBACK)
        )
        second = hosts.enter_context(started(str(folder), *given, *SECOND[kind], env=LOOPBACK))
        sessions += [first.process.pid, second.process.pid]
        end = time.monotonic() + 120  # a start takes half of it on a busy machine
        for server in (first, second):
            code = server.process.wait(max(1, end - time.monotonic()))
            assert code != 0
            assert "Rank 1 (on" in server.log, server.log[-6000:]
            assert "copy the same model to all hosts." in server.log
