"""The demo checkpoint answers its held-out questions, through the real server and the real client."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.servers import DEMO, Server

pytestmark = pytest.mark.serving

HELDOUT = [json.loads(line) for line in (DEMO.parent / "heldout.jsonl").read_text().splitlines()]


def ask(server: Server, question: str) -> str:
    answer = server.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=40
    )
    return answer.choices[0].message.content or ""


def test_exact_match_on_held_out_questions(demo: Server) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda item: ask(demo, item["question"]), HELDOUT))
    right = sum(answer == item["answer"] for answer, item in zip(answers, HELDOUT, strict=True))
    print(f"{right} of {len(HELDOUT)} held-out questions answered exactly")
    assert right >= 0.95 * len(HELDOUT)


def test_start_up_line(demo: Server) -> None:
    lines = [line for line in demo.log.splitlines() if "MindSpore 2.10.0 on cpu, kernels: " in line]
    assert len(lines) == 1
    assert "dtype: bfloat16" in lines[0]
