"""Sampling as a client sees it: seeds, several answers, beams, stops, lengths, forbidden and forced tokens."""

from collections import Counter
from typing import Any

import pytest
import torch

from tests.features.service import Service

PROMPT = [40, 41, 42, 300, 301, 40, 41, 500, 42]


@pytest.mark.representative
@pytest.mark.feature("seed")
@pytest.mark.feature("n > 1")
def test_a_seed_repeats_samples_and_they_differ_among_each_other(service: Service) -> None:
    def sample(seed: int) -> list[tuple[int, ...]]:
        choices = service.complete(PROMPT, n=4, seed=seed, temperature=2.0).choices
        assert [choice.index for choice in choices] == [0, 1, 2, 3]
        return [tuple(choice.token_ids) for choice in choices]

    assert sample(1) == sample(1) != sample(2)
    assert len(set(sample(1))) > 1


@pytest.mark.representative
@pytest.mark.feature("seed")
def test_samples_have_the_distribution_that_they_are_drawn_from(service: Service) -> None:
    """Pearson's chi-squared of 384 draws among five tokens: above 18.5 once in a thousand times (4 degrees of freedom).

    The draws are the same in each run: seeds are fixed.
    """
    draws = 384
    logits = service.family.logits(PROMPT)[-1]
    wanted = logits.median() + torch.tensor([0.0, 0.4, 0.8, 1.2, 1.6])  # so that none of them is rare
    allowed = [int((logits - value).abs().argmin()) for value in wanted]
    expected = logits[allowed].softmax(0) * draws
    choices = service.complete(
        PROMPT, n=draws, seed=1, temperature=1.0, max_tokens=1, allowed_token_ids=allowed
    ).choices
    counts = Counter(choice.token_ids[0] for choice in choices)
    found = torch.tensor([counts[token] for token in allowed])
    assert found.sum() == draws
    assert ((found - expected) ** 2 / expected).sum().item() < 18.5


@pytest.mark.parametrize(
    "only_best",
    [
        pytest.param({"top_k": 1}, marks=pytest.mark.feature("top-k")),
        pytest.param({"top_p": 1e-6}, marks=pytest.mark.feature("top-p")),
        pytest.param({"min_p": 1.0}, marks=pytest.mark.feature("min-p")),
    ],
    ids=str,
)
def test_sampling_from_one_token_is_greedy(service: Service, only_best: dict[str, Any]) -> None:
    tokens = service.tokens(PROMPT, temperature=1.0, **only_best)
    service.family.check_greedy(PROMPT, tokens)


@pytest.mark.feature("logit bias")
def test_a_bias_forces_and_forbids(service: Service) -> None:
    assert service.tokens(PROMPT, max_tokens=3, logit_bias={"777": 100.0}) == [777] * 3
    best = service.tokens(PROMPT, max_tokens=1)[0]
    assert service.tokens(PROMPT, max_tokens=1, logit_bias={str(best): -100.0}) != [best]


@pytest.mark.feature("allowed tokens")
def test_only_allowed_tokens_come(service: Service) -> None:
    allowed = [3, 5, 8, 13]
    assert set(service.tokens(PROMPT, temperature=2.0, seed=1, max_tokens=24, allowed_token_ids=allowed)) <= set(
        allowed
    )


@pytest.mark.representative
@pytest.mark.feature("bad words")
def test_bad_words_do_not_come(service: Service) -> None:
    """A word of one token never does; of one of two tokens the second does not come after the first."""
    (seven,), (eight,) = service.tokenize("7"), service.tokenize("8")
    assert service.tokenize("77") == [seven, seven]
    options: dict[str, Any] = {
        "max_tokens": 6,
        "allowed_token_ids": [seven, eight],
        "logit_bias": {str(seven): 50.0, str(eight): 0.0},
    }
    assert service.tokens(PROMPT, **options) == [seven] * 6
    assert service.tokens(PROMPT, bad_words=["7"], **options) == [eight] * 6
    assert service.tokens(PROMPT, bad_words=["77"], **options) == [seven, eight] * 3


@pytest.mark.representative
@pytest.mark.feature("stop strings")
def test_stop_strings(service: Service) -> None:
    ids = service.tokenize("seven dog")
    force = {"logit_bias": {str(token): 100.0 for token in ids[:1]}}
    word = service.post("/detokenize", {"model": "served", "tokens": ids[:1]}).json()["prompt"]
    text = word * 8
    stop = text[len(word) - 1 : len(word) + 1]  # across two tokens
    (choice,) = service.complete(PROMPT, stop=[stop], **force).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (text[: text.index(stop)], "stop", stop)
    (choice,) = service.complete(PROMPT, stop=["never", stop], include_stop_str_in_output=True, **force).choices
    assert choice.text == text[: text.index(stop) + len(stop)]


@pytest.mark.feature("stop tokens")
@pytest.mark.feature("min tokens")
@pytest.mark.feature("max tokens")
def test_stop_tokens_and_lengths(service: Service) -> None:
    tokens = service.tokens(PROMPT, max_tokens=20)
    assert len(tokens) == 20
    last = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i >= 1)
    (choice,) = service.complete(PROMPT, stop_token_ids=[tokens[last]]).choices
    assert (choice.finish_reason, choice.stop_reason) == ("stop", tokens[last])
    assert choice.token_ids == tokens[: last + 1]
    (choice,) = service.complete(
        PROMPT, stop_token_ids=[tokens[last]], min_tokens=last + 3, max_tokens=last + 5
    ).choices
    assert last + 3 <= len(choice.token_ids) <= last + 5
    assert tokens[last] not in choice.token_ids[: last + 3]
    # Greedily, without eos: the end of a sequence is forced by a bias, and ends it unless it is ignored.
    ended = service.complete(PROMPT, ignore_eos=False, logit_bias={"1023": 100.0}).choices[0]
    assert (ended.finish_reason, len(ended.token_ids)) == ("stop", 1)
    assert service.tokens(PROMPT, logit_bias={"1023": 100.0}, max_tokens=3) == [1023] * 3


@pytest.mark.representative
@pytest.mark.feature("beam search")
def test_beams_are_those_of_transformers(service: Service) -> None:
    """All beams have the same length here, so that how lengths are weighed does not matter."""
    beams, tokens = 3, 5
    choices = service.complete(PROMPT, n=beams, max_tokens=tokens, use_beam_search=True).choices
    model = service.family.model
    result = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        length_penalty=0.0,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    expected = result.sequences[:, len(PROMPT) :].tolist()
    gaps = result.sequences_scores[:-1] - result.sequences_scores[1:]
    assert gaps.min().item() > 2 * tokens * service.family.tolerance or service.family.name == "quantized"
    tokenizer_ids = [list(choice.token_ids) for choice in choices]
    assert tokenizer_ids == expected


@pytest.mark.feature("beam search")
def test_beams_in_a_chat(service: Service) -> None:
    options = {"n": 2, "extra_body": {"use_beam_search": True, "length_penalty": 0.0}}
    answer = service.chat("What is 12 + 7?", **options)
    assert len(answer.choices) == 2
    if service.family.name == "qwen2":
        assert answer.choices[0].message.content == "19"


@pytest.mark.feature("repetition detection")
def test_a_repetition_ends_a_text(service: Service) -> None:
    detection = {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 4}
    options: dict[str, Any] = {"logit_bias": {"777": 100.0}, "max_tokens": 40}
    (choice,) = service.complete(PROMPT, repetition_detection=detection, **options).choices
    assert len(choice.token_ids) < 12
