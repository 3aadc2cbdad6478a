"""A real server of a model from mindformers, as a user starts it."""

import json

from tests.servers import DEMO, serve

QUESTIONS = {"What is 12 + 7?": "19", "What is the opposite of hot?": "cold", "Spell cat backwards.": "t-a-c"}


def test_vllm_serve() -> None:
    source = json.dumps({"model_source": "mindformers"})
    with serve(DEMO, "--served-model-name", "demo", "--dtype", "float32", "--additional-config", source) as server:
        for question, answer in QUESTIONS.items():
            messages = [{"role": "user", "content": question}]
            chat = server.client.chat.completions.create(model="demo", messages=messages, temperature=0)
            assert chat.choices[0].message.content == answer
        assert "mindformers - INFO" not in server.log
        assert "+----" not in server.log  # its table of options
