"""vLLM's other front ends, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import DEMO, VLLM, Server

pytestmark = pytest.mark.serving

OFFLINE = """
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM({model!r}, max_model_len=256, max_num_seqs=4)
    chat = [{{"role": "user", "content": "What is 12 + 7?"}}]
    print("ANSWER", llm.chat(chat, SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text)
"""


def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})}, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.feature("offline LLM", families=["qwen2"])
@pytest.mark.parametrize("multiprocessing", ["0", "1"])
def test_offline_llm_in_one_process_and_in_two(tmp_path: Path, multiprocessing: str) -> None:
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE.format(model=str(DEMO)))
    done = run(sys.executable, str(script), env={"VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing})
    assert "ANSWER 19" in done.stdout
    assert "Traceback" not in done.stderr  # also a clean shutdown


@pytest.mark.feature("vllm run-batch", families=["qwen2"])
def test_run_batch(tmp_path: Path) -> None:
    questions = {"sum": "What is 12 + 7?", "other": "What is 20 + 5?"}
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": str(DEMO), "messages": [{"role": "user", "content": text}], "temperature": 0},
        }
        for name, text in questions.items()
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    run(VLLM, "run-batch", "-i", str(source), "-o", str(target), "--model", str(DEMO), "--max-model-len", "256")
    replies = [json.loads(line) for line in target.read_text().splitlines()]
    texts = {r["custom_id"]: r["response"]["body"]["choices"][0]["message"]["content"] for r in replies}
    assert texts["sum"].startswith("19") and texts["other"].startswith("25")


@pytest.mark.feature("vllm bench serve", families=["qwen2"])
def test_bench_serve(demo: Server, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    run(
        *[VLLM, "bench", "serve", "--model", "demo", "--tokenizer", str(DEMO), "--base-url", demo.url],
        *["--dataset-name", "random", "--random-input-len", "20", "--random-output-len", "8", "--num-prompts", "8"],
        *["--ignore-eos", "--save-result", "--result-filename", str(result)],
    )
    report = json.loads(result.read_text())
    assert (report["completed"], report["total_output_tokens"]) == (8, 64)


@pytest.mark.feature("vllm bench throughput", families=["qwen2"])
def test_bench_throughput(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    run(
        *[VLLM, "bench", "throughput", "--model", str(DEMO), "--dataset-name", "random", "--random-input-len", "20"],
        *["--random-output-len", "8", "--num-prompts", "8", "--max-model-len", "256", "--output-json", str(result)],
    )
    assert json.loads(result.read_text())["num_requests"] == 8


@pytest.mark.slow
@pytest.mark.feature("vllm bench latency", families=["qwen2"])
def test_bench_latency(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    run(
        *[VLLM, "bench", "latency", "--model", str(DEMO), "--max-model-len", "256", "--output-json", str(result)],
        *["--input-len", "20", "--output-len", "8", "--batch-size", "2", "--num-iters", "3", "--num-iters-warmup", "1"],
    )
    assert len(json.loads(result.read_text())["latencies"]) == 3


@pytest.mark.slow
@pytest.mark.feature("vllm chat", families=["qwen2"])
@pytest.mark.feature("vllm complete", families=["qwen2"])
def test_chat_and_complete(demo: Server) -> None:
    chat = run(VLLM, "chat", "--url", f"{demo.url}/v1", "--model-name", "demo", "--quick", "What is 12 + 7?")
    assert chat.stdout.splitlines()[-1].strip() == "19"
    prompt = "<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<|im_start|>assistant\n"
    done = run(VLLM, "complete", "--url", f"{demo.url}/v1", "--model-name", "demo", "--quick", prompt)
    assert done.stdout.strip().endswith("19")
