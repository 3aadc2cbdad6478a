"""vLLM's commands besides `serve`, run as a user runs them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.features.families import QUICK, family
from tests.features.service import Service
from tests.servers import VLLM

RANDOM = ("--dataset-name", "random", "--random-input-len", "20", "--random-output-len", "8", "--num-prompts", "8")
ENGINE = ("--max-model-len", "256", "--dtype", "float32")

engines = pytest.mark.parametrize(
    "family_name",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.feature("vllm run-batch", families=[name]),
                pytest.mark.feature("vllm bench throughput", families=[name]),
                pytest.mark.feature("vllm bench latency", families=[name]),
            ]
            + [pytest.mark.slow] * (name != QUICK[0]),
        )
        for name in QUICK
    ],
)


def run(*command: str) -> str:
    """Standard output of a vLLM command that succeeds."""
    done = subprocess.run([VLLM, *command], capture_output=True, text=True, timeout=300, env=os.environ, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def model_option(name: str) -> tuple[str, str]:
    return "--model", str(family(name).folder)


@engines
def test_run_batch(family_name: str, tmp_path: Path) -> None:
    model = family(family_name)
    questions = {"sum": "What is 12 + 7?", "long": "Who are you? " * 12}
    body = {"model": str(model.folder), "temperature": 0, "max_completion_tokens": 6, "return_token_ids": True}
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": body | {"messages": [{"role": "user", "content": question}]},
        }
        for name, question in questions.items()
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    run("run-batch", "-i", str(source), "-o", str(target), *model_option(family_name), *ENGINE)
    replies = [json.loads(line) for line in target.read_text().splitlines()]
    assert {reply["custom_id"] for reply in replies} == set(questions)
    for reply in replies:
        answer = reply["response"]["body"]
        (choice,) = answer["choices"]
        model.check_greedy(answer["prompt_token_ids"], choice["token_ids"])
        if family_name == "qwen2" and reply["custom_id"] == "sum":
            assert choice["message"]["content"] == "19"


@engines
def test_bench_throughput(family_name: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    run("bench", "throughput", *model_option(family_name), *RANDOM, *ENGINE, "--output-json", str(result))
    assert json.loads(result.read_text())["num_requests"] == 8


@pytest.mark.slow
@engines
def test_bench_latency(family_name: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    sizes = (
        "--input-len",
        "20",
        "--output-len",
        "8",
        "--batch-size",
        "2",
        "--num-iters",
        "3",
        "--num-iters-warmup",
        "1",
    )
    model = family(family_name, vocabulary=10_000)  # the command takes tokens from so many
    run("bench", "latency", "--model", str(model.folder), *sizes, *ENGINE, "--output-json", str(result))
    assert len(json.loads(result.read_text())["latencies"]) == 3


@pytest.mark.feature("vllm bench serve")
def test_bench_serve(service: Service, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    where = ("--model", "served", "--tokenizer", str(service.family.folder), "--base-url", service.server.url)
    run("bench", "serve", *where, *RANDOM, "--ignore-eos", "--save-result", "--result-filename", str(result))
    report = json.loads(result.read_text())
    assert (report["completed"], report["total_output_tokens"]) == (8, 64)


@pytest.mark.slow
@pytest.mark.feature("vllm chat")
@pytest.mark.feature("vllm complete")
def test_chat_and_complete(service: Service) -> None:
    """Both sample as the server is told to by default: the demo greedily, models without a generation config not."""
    where = ("--url", f"{service.server.url}/v1", "--model-name", "served", "--quick")
    rendered = "<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<|im_start|>assistant\n"
    answers = run("chat", *where, "What is 12 + 7?"), run("complete", *where, rendered)
    assert all(answer.strip() for answer in answers)
    if service.family.name == "qwen2":
        assert [answer.split()[-1] for answer in answers] == ["19", "19"]
