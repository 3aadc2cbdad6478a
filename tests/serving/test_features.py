"""One end-to-end test for each thing that a client of the OpenAI API asks of the server."""

import json
import re
from typing import Any

import httpx
import pytest

from tests.servers import Server

pytestmark = pytest.mark.serving

QUESTION = "What is 12 + 7?"
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}]}
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def complete(server: Server, prompt: Any = PROMPT, **options: Any) -> Any:
    """A text completion through the real client; options that OpenAI does not know go in the body."""
    known = {"max_tokens", "temperature", "n", "seed", "stop", "logprobs", "echo", "logit_bias", "top_p", "stream"}
    own = {name: options.pop(name) for name in list(options) if name not in known}
    options = {"max_tokens": 8, "temperature": 0, **options}
    return server.client.completions.create(model="demo", prompt=prompt, extra_body=own, **options)


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def tokens(server: Server, text: str) -> list[int]:
    ids: list[int] = post(server, "/tokenize", {"model": "demo", "prompt": text}).json()["tokens"]
    return ids


def test_streamed_chunks_join_to_the_answer(demo: Server) -> None:
    whole = demo.client.chat.completions.create(**CHAT, temperature=0).choices[0].message.content
    stream = demo.client.chat.completions.create(**CHAT, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_chat_ends_by_itself_with_usage(demo: Server) -> None:
    answer = demo.client.chat.completions.create(**CHAT, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    rendered = post(demo, "/tokenize", {"model": "demo", "messages": CHAT["messages"]}).json()
    assert answer.usage is not None and answer.usage.prompt_tokens == rendered["count"]


def test_seed_repeats_a_sample_and_n_gives_several(demo: Server) -> None:
    def sample(seed: int) -> list[str]:
        choices = complete(demo, n=4, seed=seed, temperature=1.5, ignore_eos=True).choices
        return [choice.text for choice in choices]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert len(set(sample(1))) > 1


@pytest.mark.parametrize("only_best", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_truncated_sampling_of_one_token_is_greedy(demo: Server, only_best: dict[str, Any]) -> None:
    assert complete(demo, temperature=1.0, **only_best).choices[0].text == complete(demo).choices[0].text


def test_temperature_flattens_the_distribution(demo: Server) -> None:
    def distinct(temperature: float) -> int:
        reply = complete(demo, n=8, seed=0, temperature=temperature, max_tokens=4, ignore_eos=True)
        return len({choice.text for choice in reply.choices})

    assert distinct(0.01) == 1
    assert distinct(2.0) > 1


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 10.0}]
)
def test_penalties_make_a_text_less_repetitive(demo: Server, penalty: dict[str, float]) -> None:
    def distinct(**options: float) -> int:
        reply = complete(demo, max_tokens=60, ignore_eos=True, return_token_ids=True, **options)
        return len(set(reply.choices[0].token_ids))

    assert distinct(**penalty) > distinct()


def test_logit_bias_forces_and_bad_words_and_allowed_tokens_forbid(demo: Server) -> None:
    best = complete(demo, max_tokens=1, return_token_ids=True).choices[0]
    forced = tokens(demo, "seven")[0]
    biased = complete(demo, max_tokens=1, logit_bias={str(forced): 100.0}, return_token_ids=True).choices[0]
    assert biased.token_ids == [forced]
    assert complete(demo, max_tokens=1, bad_words=[best.text]).choices[0].text != best.text
    allowed = [forced, tokens(demo, "cat")[0]]
    reply = complete(demo, max_tokens=5, allowed_token_ids=allowed, return_token_ids=True, ignore_eos=True)
    assert set(reply.choices[0].token_ids) <= set(allowed)


def test_stop_strings_stop_ids_and_lengths(demo: Server) -> None:
    text = complete(demo).choices[0].text
    stopped = complete(demo, stop=[text[1]]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[1])], "stop")
    first = complete(demo, max_tokens=1, return_token_ids=True).choices[0].token_ids
    by_id = complete(demo, stop_token_ids=first).choices[0]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", first[0])
    long = complete(demo, min_tokens=20, max_tokens=24, return_token_ids=True).choices[0]
    assert 20 <= len(long.token_ids) <= 24


def test_logprobs_are_a_distribution_and_name_the_choice(demo: Server) -> None:
    logprobs = complete(demo, max_tokens=3, logprobs=5).choices[0].logprobs
    for token, chosen, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == chosen == max(top.values())
        assert sum(2.718281828**value for value in top.values()) <= 1 + 1e-4  # float32 softmax of five of its terms


def test_prompt_logprobs_and_echo_agree(demo: Server) -> None:
    reply = complete(demo, max_tokens=1, prompt_logprobs=0, logprobs=0, echo=True)
    choice = reply.choices[0]
    assert choice.text.startswith(PROMPT)
    ids = tokens(demo, PROMPT)
    ours = [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], choice.prompt_logprobs[1:], strict=True)]
    assert ours == pytest.approx(choice.logprobs.token_logprobs[1 : len(ids)])


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": r"[0-9]{3}-[0-9]{2}"}, r"[0-9]{3}-[0-9]{2}"),
        ({"choice": ["forty-two", "seven"]}, r"forty-two|seven"),
        ({"grammar": 'root ::= "yes" | "no"'}, r"yes|no"),
    ],
)
def test_structured_output(demo: Server, constraint: dict[str, Any], pattern: str) -> None:
    text = complete(demo, max_tokens=30, structured_outputs=constraint).choices[0].text
    assert re.fullmatch(pattern, text)


def test_structured_json(demo: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    answer = demo.client.chat.completions.create(**CHAT, temperature=0, max_tokens=60, response_format=form)
    assert 0 <= json.loads(answer.choices[0].message.content or "")["sum"] <= 99


def test_models_tokenize_metrics(demo: Server) -> None:
    assert [model.id for model in demo.client.models.list().data] == ["demo"]
    ids = tokens(demo, "cat and dog")
    assert post(demo, "/detokenize", {"model": "demo", "tokens": ids}).json()["prompt"] == "cat and dog"
    metrics = httpx.get(f"{demo.url}/metrics").text
    assert re.search(r"^vllm:prompt_tokens_total\{.*\} [1-9]", metrics, re.M)


def test_unknown_model_and_impossible_request_are_client_errors(demo: Server) -> None:
    assert post(demo, "/v1/completions", {"model": "other", "prompt": "x"}).status_code == 404
    too_long = post(demo, "/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 10**6})
    assert too_long.status_code == 400
    assert "max" in too_long.json()["error"]["message"]
