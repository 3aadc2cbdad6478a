"""`vllm serve --speculative-config`: the demo's answers stay what they are."""

import json
import re
from typing import Any

import httpx
import pytest

from tests.servers import DEMO, Server, serve

pytestmark = pytest.mark.serving

QUESTIONS = ["What is 12 + 7?", "Spell cat backwards.", "Spell elephant backwards.", "Who are you?"]


def answers(server: Server, **options: Any) -> list[str]:
    return [
        server.client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": question}], max_tokens=24, **options
        )
        .choices[0]
        .message.content
        or ""
        for question in QUESTIONS
    ]


def counted(server: Server, name: str) -> float:
    found = re.search(rf"^vllm:{name}_total{{.*}} (\S+)$", httpx.get(f"{server.url}/metrics").text, re.M)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("ngram", marks=pytest.mark.feature("speculation by n-grams", families=["qwen2"])),
        pytest.param(
            "draft_model",
            marks=[pytest.mark.feature("speculation by a draft model", families=["qwen2"]), pytest.mark.slow],
        ),
    ],
)
def test_answers_of_a_server_that_speculates(demo: Server, method: str) -> None:
    """Greedy, sampled with a seed, and within a grammar; the demo is its own draft."""
    speculation = {"method": method, "num_speculative_tokens": 3}
    speculation |= {"prompt_lookup_max": 2, "prompt_lookup_min": 1} if method == "ngram" else {"model": str(DEMO)}
    compact = '{"backend": "xgrammar", "disable_any_whitespace": true}'
    options = ["--served-model-name", "demo", "--structured-outputs-config", compact]
    constraint = {"structured_outputs": {"regex": r"([a-z]-){3,9}[0-9]{2}"}}
    with serve(DEMO, *options, "--speculative-config", json.dumps(speculation)) as server:
        for sampling in (
            {"temperature": 0},
            {"temperature": 1.2, "seed": 7},
            {"temperature": 1, "top_p": 0.9, "seed": 8},
        ):
            assert answers(server, **sampling) == answers(demo, **sampling)
        got = answers(server, temperature=0, extra_body=constraint)
        assert got == answers(demo, temperature=0, extra_body=constraint)
        assert all(re.fullmatch(r"([a-z]-){3,9}[0-9]{2}", text) for text in got)
        assert 0 < counted(server, "spec_decode_num_accepted_tokens") <= counted(server, "spec_decode_num_draft_tokens")
