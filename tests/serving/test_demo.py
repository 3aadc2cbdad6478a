"""The demo checkpoint answers its held-out questions, through the real server and the real client."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.servers import DEMO, Server, serve
from vllm_ms_models.cli import main

pytestmark = pytest.mark.serving

HELDOUT = [json.loads(line) for line in (DEMO.parent / "heldout.jsonl").read_text().splitlines()]


def ask(server: Server, question: str) -> str:
    answer = server.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=40
    )
    return answer.choices[0].message.content or ""


def exact_matches(server: Server) -> int:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda item: ask(server, item["question"]), HELDOUT))
    right = sum(answer == item["answer"] for answer, item in zip(answers, HELDOUT, strict=True))
    print(f"{right} of {len(HELDOUT)} held-out questions answered exactly")
    return right


def test_exact_match_on_held_out_questions(demo: Server) -> None:
    assert exact_matches(demo) >= 0.95 * len(HELDOUT)


STATIC = ("w8a8-static", "--calibration", str(DEMO.parent / "calibration.jsonl"))


@pytest.mark.parametrize(
    ("scheme", "points"),
    [
        pytest.param(("w8a8-dynamic",), 1, id="w8a8-dynamic"),
        pytest.param(STATIC, 1, id="w8a8-static", marks=pytest.mark.slow),
        pytest.param((*STATIC, "--format", "modelslim"), 1, id="w8a8-static, modelslim", marks=pytest.mark.slow),
        pytest.param(("w4a16",), 3, id="w4a16", marks=pytest.mark.slow),
    ],
)
def test_what_quantization_costs(demo: Server, tmp_path: Path, scheme: tuple[str, ...], points: int) -> None:
    """Percentage points of the held-out questions, from `vllm-ms quantize` to `vllm serve`."""
    folder = tmp_path / "quantized"
    assert main(["quantize", str(DEMO), str(folder), "--scheme", *scheme]) == 0
    with serve(folder, "--served-model-name", "demo", "--max-model-len", "512") as server:
        lost = exact_matches(demo) - exact_matches(server)
    assert lost <= points / 100 * len(HELDOUT)


def test_start_up_line(demo: Server) -> None:
    lines = [line for line in demo.log.splitlines() if "MindSpore 2.10.0 on cpu, kernels: " in line]
    assert len(lines) == 1
    assert "dtype: bfloat16" in lines[0]
