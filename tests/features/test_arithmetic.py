"""What each sampling parameter does to a distribution: the whole vocabulary's log-probabilities against torch's.

The server gives log-probabilities as they are sampled from (`--logprobs-mode processed_logprobs`). The formulas are
OpenAI's (penalties, biases), and those of the papers of CTRL (repetition), nucleus sampling and min-p.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.features.families import VOCABULARY
from tests.features.service import Service, distribution

PROMPT = [40, 41, 42, 300, 301, 40, 41, 500, 42]
TOKENS = 6
NEVER = float("-inf")

Change = Callable[[np.ndarray, list[int]], np.ndarray]
"""Logits `[vocab]` and the tokens generated so far -> logits."""


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def only(kept: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return np.where(kept, logits, NEVER)


def among(tokens: list[int]) -> np.ndarray:
    return np.isin(np.arange(VOCABULARY), tokens)


def counts(tokens: list[int]) -> np.ndarray:
    return np.bincount(tokens, minlength=VOCABULARY)


def repetition(factor: float) -> Change:
    def change(x: np.ndarray, output: list[int]) -> np.ndarray:
        return np.where(among(PROMPT + output), np.where(x > 0, x / factor, x * factor), x)

    return change


def top_k(k: int) -> Change:
    return lambda x, _: only(x >= np.sort(x)[-k], x)


def top_p(p: float) -> Change:
    """The fewest tokens that together have at least `p`."""

    def change(x: np.ndarray, output: list[int]) -> np.ndarray:
        order = np.argsort(-x)
        before = np.cumsum(np.exp(log_softmax(x)[order]))
        kept = np.zeros(VOCABULARY, bool)
        kept[order[: int((before < p).sum()) + 1]] = True
        return only(kept, x)

    return change


def min_p(p: float) -> Change:
    return lambda x, _: only(x >= x.max() + np.log(p), x)


def without(tokens: list[int], first: int = TOKENS) -> Change:
    return lambda x, output: only(~among(tokens), x) if len(output) < first else x


CASES: dict[str, tuple[dict[str, Any], list[Change]]] = {
    "temperature": ({"temperature": 1.7}, [lambda x, _: x / 1.7]),
    "presence penalty": ({"presence_penalty": 1.5}, [lambda x, output: x - 1.5 * (counts(output) > 0)]),
    "frequency penalty": ({"frequency_penalty": 0.8}, [lambda x, output: x - 0.8 * counts(output)]),
    "repetition penalty": ({"repetition_penalty": 1.6}, [repetition(1.6)]),
    "logit bias": (
        {"logit_bias": {"7": 3.0, "1000": -50.0}},
        [lambda x, _: x + 3 * among([7]) - 50 * among([1000])],
    ),
    "allowed tokens": ({"allowed_token_ids": [3, 5, 8, 13, 1039]}, [lambda x, _: only(among([3, 5, 8, 13, 1039]), x)]),
    "min tokens": (
        {"min_tokens": 3, "stop_token_ids": [9, 10], "ignore_eos": False},
        [without([9, 10, 1023], first=3)],
    ),
    "top-k": ({"top_k": 7}, [top_k(7)]),
    "top-p": ({"top_p": 0.6}, [top_p(0.6)]),
    "min-p": ({"min_p": 0.15}, [min_p(0.15)]),
    "all at once": (
        {
            "temperature": 0.8,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.25,
            "repetition_penalty": 1.2,
            "logit_bias": {"7": 2.0},
            "top_k": 40,
        },
        [
            lambda x, _: x + 2 * among([7]),
            repetition(1.2),
            lambda x, output: x - 0.25 * counts(output) - 0.5 * (counts(output) > 0),
            lambda x, _: x / 0.8,
            top_k(40),
        ],
    ),
}
FEATURES = {"all at once": "sampling parameters together"}


@pytest.mark.representative
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.feature(FEATURES.get(name, name))) for name in CASES]
)
def test_distribution(service: Service, case: str) -> None:
    parameters, changes = CASES[case]
    options = {"temperature": 1.0, "max_tokens": TOKENS, "seed": 5} | parameters
    (choice,) = service.complete(PROMPT, logprobs=VOCABULARY, return_tokens_as_token_ids=True, **options).choices
    output = list(choice.token_ids)
    assert len(output) == TOKENS or choice.finish_reason == "stop"
    rows = service.family.logits(PROMPT + output).double().numpy()[len(PROMPT) - 1 : -1]
    compared = 0
    for number, (logits, top) in enumerate(zip(rows, choice.logprobs.top_logprobs, strict=True)):
        found, expected = distribution(top, VOCABULARY), logits
        for change in changes:
            expected = change(expected, output[:number])
        assert found[output[number]] > NEVER, "an impossible token"
        expected = log_softmax(expected)
        # A threshold may lie between two tokens that differ by rounding: then one of them is in and the other is not.
        if (np.isinf(found) != np.isinf(expected)).sum() == 1 and case in ("top-p", "min-p"):
            continue
        finite = np.isfinite(expected)
        assert np.array_equal(np.isfinite(found), finite)
        # A penalty by a factor widens a difference by it, a temperature below 1 likewise.
        np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=2 * service.family.tolerance)
        compared += 1
    assert compared >= len(output) - 1


@pytest.mark.representative
@pytest.mark.feature("log-probabilities")
def test_logprobs_of_the_whole_vocabulary(service: Service) -> None:
    (choice,) = service.complete(PROMPT, logprobs=VOCABULARY, return_tokens_as_token_ids=True).choices
    output = list(choice.token_ids)
    service.family.check_greedy(PROMPT, output)
    rows = service.family.logits(PROMPT + output).double().numpy()[len(PROMPT) - 1 : -1]
    for logits, top, name, chosen in zip(
        rows, choice.logprobs.top_logprobs, choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True
    ):
        found = distribution(top, VOCABULARY)
        np.testing.assert_allclose(found, log_softmax(logits), rtol=0, atol=service.family.tolerance)
        assert top[name] == chosen == max(top.values())


@pytest.mark.representative
@pytest.mark.feature("prompt log-probabilities")
@pytest.mark.feature("echo")
def test_prompt_logprobs_and_echo(service: Service) -> None:
    """A prompt of several chunks."""
    prompt = [(7 * i * i + 3) % 1000 for i in range(150)]
    (choice,) = service.complete(prompt, max_tokens=2, echo=True, logprobs=0, prompt_logprobs=0).choices
    expected = (
        service.family.logits(prompt).log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].numpy()
    )
    of_prompt = [
        entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], choice.prompt_logprobs[1:], strict=True)
    ]
    np.testing.assert_allclose(of_prompt, expected, rtol=0, atol=service.family.tolerance)
    echoed = choice.logprobs.token_logprobs
    assert len(echoed) == len(prompt) + 2 and echoed[0] is None
    np.testing.assert_allclose(echoed[1 : len(prompt)], expected, rtol=0, atol=service.family.tolerance)


@pytest.mark.feature("log-probabilities")
def test_logprobs_of_a_chat(service: Service) -> None:
    """In one piece and as a stream."""
    own = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 4, "max_completion_tokens": 5, "extra_body": own}
    reply = service.chat("What is 12 + 7?", **options)
    (choice,) = reply.choices
    rows = service.family.logits(reply.prompt_token_ids + choice.token_ids).log_softmax(-1)
    best = rows[len(reply.prompt_token_ids) - 1 : -1].topk(4, -1).values.numpy()
    found = [[top.logprob for top in position.top_logprobs] for position in choice.logprobs.content]
    np.testing.assert_allclose(found, best, rtol=0, atol=service.family.tolerance)
    streamed = [
        position.logprob
        for chunk in service.chat("What is 12 + 7?", stream=True, **options)
        for position in (chunk.choices[0].logprobs.content if chunk.choices and chunk.choices[0].logprobs else [])
    ]
    np.testing.assert_allclose(streamed, best[:, 0], rtol=0, atol=service.family.tolerance)


@pytest.mark.feature("log-probabilities of named tokens")
def test_logprobs_of_named_tokens(service: Service) -> None:
    named = [5, 700, 1039]
    (choice,) = service.complete(
        PROMPT, max_tokens=1, logprobs=1, logprob_token_ids=named, return_tokens_as_token_ids=True
    ).choices
    expected = service.family.logits(PROMPT)[-1].log_softmax(-1)
    (top,) = choice.logprobs.top_logprobs
    for token in named:
        assert top[f"token_id:{token}"] == pytest.approx(expected[token].item(), abs=service.family.tolerance)
