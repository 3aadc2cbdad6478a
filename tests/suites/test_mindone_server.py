"""A real `vllm serve` whose model comes from mindone, and real clients."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.servers import DEMO, Server, serve

QUESTIONS = {
    "What is 12 + 7?": "19",
    "What is the opposite of hot?": "cold",
    "Spell cat backwards.": "t-a-c",
    "Who are you?": "I am a tiny Qwen2 served by MindSpore.",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    option = json.dumps({"model_source": "mindone"})
    with serve(DEMO, "--served-model-name", "demo", "--additional-config", option) as server:
        yield server


def ask(server: Server, question: str) -> str:
    chat = server.client.chat.completions.create(
        model="demo", temperature=0, messages=[{"role": "user", "content": question}]
    )
    return chat.choices[0].message.content or ""


def test_chats_at_once(server: Server) -> None:
    """The answers that the demo model was trained to give (README.md), each four times."""
    questions = [*QUESTIONS] * 4
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: ask(server, question), questions))
    assert answers == [QUESTIONS[question] for question in questions]
    assert "Qwen2ForCausalLM comes from mindone." in server.log


def test_streaming(server: Server) -> None:
    stream = server.client.chat.completions.create(
        model="demo", temperature=0, stream=True, messages=[{"role": "user", "content": "What is 12 + 7?"}]
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "19"
