"""The server's end points, by their own clients."""

import json
from typing import Any

import anthropic
import pytest

from tests.features.service import Service

PROMPT = [40, 41, 42, 300, 301, 40, 41, 500, 42]
QUESTION = "What is 12 + 7?"


def answer_of(service: Service, question: str = QUESTION) -> str:
    """Checked against torch, token by token."""
    rendered = service.post(
        "/tokenize", {"model": "served", "messages": [{"role": "user", "content": question}]}
    ).json()
    reply = service.chat(question, extra_body={"return_token_ids": True})
    (choice,) = reply.choices
    service.family.check_greedy(rendered["tokens"], list(choice.token_ids))
    assert reply.usage.prompt_tokens == rendered["count"]
    assert reply.usage.completion_tokens == len(choice.token_ids)
    text: str = choice.message.content
    if service.family.name == "qwen2" and question == QUESTION:
        assert (text, choice.finish_reason) == ("19", "stop")
    return text


@pytest.mark.representative
@pytest.mark.feature("chat completions")
@pytest.mark.feature("streaming")
def test_chat_and_its_stream(service: Service) -> None:
    whole = answer_of(service)
    chunks = list(service.chat(QUESTION, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] in ("stop", "length") and not any(ends[:-1])


@pytest.mark.representative
@pytest.mark.feature("completions")
@pytest.mark.feature("streaming")
def test_completions_and_their_stream(service: Service) -> None:
    """Two prompts and two samples of each, their chunks as they come; log-probabilities too."""
    prompts = [PROMPT, PROMPT[:4]]
    options: dict[str, Any] = {"n": 2, "seed": 3, "temperature": 1.0, "max_tokens": 12, "logprobs": 1}
    whole = service.complete(prompts, **options)
    tokens: dict[int, list[int]] = {index: [] for index in range(4)}
    logprobs: dict[int, list[float]] = {index: [] for index in range(4)}
    for chunk in service.complete(prompts, stream=True, **options):
        for choice in chunk.choices:
            tokens[choice.index] += choice.token_ids or []
            logprobs[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    for choice in whole.choices:
        assert tokens[choice.index] == choice.token_ids
        assert logprobs[choice.index] == pytest.approx(choice.logprobs.token_logprobs, abs=2 * service.family.tolerance)


@pytest.mark.representative
@pytest.mark.feature("Responses API")
def test_responses(service: Service) -> None:
    options = {"model": "served", "input": QUESTION, "temperature": 0, "max_output_tokens": 16}
    expected = answer_of(service)
    reply = service.client.responses.create(**options)
    assert reply.output_text == expected
    events = list(service.client.responses.create(stream=True, **options))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == expected


@pytest.mark.representative
@pytest.mark.feature("Anthropic Messages API")
def test_messages(service: Service) -> None:
    client = anthropic.Anthropic(base_url=service.server.url, api_key="none", timeout=120, max_retries=0)
    request: Any = {
        "model": "served",
        "max_tokens": 16,
        "messages": [{"role": "user", "content": QUESTION}],
        "extra_body": {"temperature": 0},
    }
    expected = answer_of(service)
    message = client.messages.create(**request)
    (block,) = message.content
    assert block.type == "text" and block.text == expected
    assert message.stop_reason in ("end_turn", "max_tokens")
    with client.messages.stream(**request) as stream:
        assert "".join(stream.text_stream) == expected
    counted = client.messages.count_tokens(model="served", messages=request["messages"])
    assert counted.input_tokens == message.usage.input_tokens


@pytest.mark.representative
@pytest.mark.feature("tokenize and detokenize")
@pytest.mark.feature("models")
def test_models_and_tokens(service: Service) -> None:
    (model,) = service.client.models.list().data
    assert (model.id, model.max_model_len, model.root) == ("served", 512, str(service.family.folder))
    ids = service.tokenize("cat and dog")
    assert service.post("/detokenize", {"model": "served", "tokens": ids}).json()["prompt"] == "cat and dog"
    assert service.get("/tokenizer_info").status_code == 200


@pytest.mark.feature("metrics")
@pytest.mark.feature("health and load")
def test_metrics(service: Service) -> None:
    before = {name: service.counter(name) for name in ("prompt_tokens", "generation_tokens", "request_success")}
    service.complete([PROMPT, PROMPT], max_tokens=5)
    after = {name: service.counter(name) for name in before}
    assert {name: after[name] - before[name] for name in before} == {
        "prompt_tokens": 18,
        "generation_tokens": 10,
        "request_success": 2,
    }
    assert service.get("/health").status_code == service.get("/ping").status_code == 200
    assert service.get("/load").json() == {"server_load": 0}
    assert service.get("/version").json()["version"].startswith("0.32.0")


@pytest.mark.feature("generative scoring")
def test_generative_scoring(service: Service) -> None:
    """The chances of two labels after a query and each of two items, among themselves."""
    labels, items = [17, 900], [[5, 6, 7], [8]]
    body = {"model": "served", "query": PROMPT, "items": items, "label_token_ids": labels}
    reply = service.post("/generative_scoring", body)
    assert reply.status_code == 200, reply.text
    for item, result in zip(items, reply.json()["data"], strict=True):
        expected = service.family.logits(PROMPT + item)[-1][labels].softmax(0)[0].item()
        # A difference of logits is off by twice what one is, and a chance by at most a quarter of that.
        assert result["score"] == pytest.approx(expected, abs=service.family.tolerance), json.dumps(result)


@pytest.mark.feature("token-in token-out")
def test_tokens_in_tokens_out(service: Service) -> None:
    sampling = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    reply = service.post(
        "/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": sampling, "model": "served"}
    )
    assert reply.status_code == 200, reply.text
    service.family.check_greedy(PROMPT, reply.json()["choices"][0]["token_ids"])


@pytest.mark.feature("batches of chats")
def test_batch_of_chats(service: Service) -> None:
    """Several conversations in one request: what each gets alone."""
    questions = [QUESTION, "What is the opposite of hot?"]
    messages = [[{"role": "user", "content": question}] for question in questions]
    body = {"model": "served", "messages": messages, "temperature": 0, "max_completion_tokens": 16}
    reply = service.post("/v1/chat/completions/batch", body)
    assert reply.status_code == 200, reply.text
    answers = {choice["index"]: choice["message"]["content"] for choice in reply.json()["choices"]}
    assert [answers[index] for index in range(2)] == [answer_of(service, question) for question in questions]
