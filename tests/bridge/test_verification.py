"""Drafts are verified by sampling: the tokens are those that vLLM's sampler draws one position after the other."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_ms_models.bridge import triton_overrides
from vllm_ms_models.bridge.sampler import MindSporeSampler
from vllm_ms_models.bridge.verification import MatchingSampler

VOCAB = 9


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    triton_overrides.register()


def sampling(temperatures: list[float], generators: dict[int, torch.Generator], **options: Any) -> SamplingMetadata:
    """Of requests that ask for nothing but a temperature, and `options`."""
    count = len(temperatures)
    return SamplingMetadata(
        temperature=torch.tensor(temperatures),
        all_greedy=max(temperatures) == 0,
        all_random=min(temperatures) > 0,
        generators=generators,
        **{
            "top_p": None,
            "top_k": None,
            "max_num_logprobs": None,
            "no_penalties": True,
            "prompt_token_ids": None,
            "frequency_penalties": torch.zeros(count),
            "presence_penalties": torch.zeros(count),
            "repetition_penalties": torch.ones(count),
            "output_token_ids": [[] for _ in range(count)],
            "allowed_token_ids_mask": None,
            "bad_words_token_ids": {},
            "logitsprocs": LogitsProcessors(),
            **options,
        },
    )


def speculation(drafts: list[list[int]]) -> SpecDecodeMetadata:
    """Of requests with these drafts, one row of logits for each draft and one more."""
    metadata = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    last = metadata.cu_num_sampled_tokens.long() - 1
    rows = torch.ones(int(last[-1]) + 1, dtype=torch.bool)
    rows[last] = False
    metadata.bonus_logits_indices, metadata.target_logits_indices = last, torch.nonzero(rows).view(-1)
    return metadata


def matching(**options: Any) -> MatchingSampler:
    return MatchingSampler(MindSporeSampler(**options))


def seeded(seeds: list[int | None]) -> dict[int, torch.Generator]:
    return {i: torch.Generator().manual_seed(seed) for i, seed in enumerate(seeds) if seed is not None}


def one_by_one(
    logits: torch.Tensor, drafts: list[list[int]], temperatures: list[float], seeds: list[int], **options: Any
) -> tuple[list[list[int]], list[bytes]]:
    """vLLM's sampler, one row at a time; what remains of each generator."""
    tokens, states, first = [], [], 0
    for i, own in enumerate(drafts):
        generators, row = seeded([seeds[i]]), []
        given = {name: value[i : i + 1] for name, value in options.items()}
        for position in range(len(own) + 1):
            metadata = sampling([temperatures[i]], generators, **given)
            output = MindSporeSampler()(logits[first + position : first + position + 1].clone(), metadata)
            row.append(int(output.sampled_token_ids[0, 0]))
            if own[position : position + 1] != row[-1:]:
                break
        tokens.append(row)
        states.append(generators[0].get_state().numpy().tobytes())
        first += len(own) + 1
    return tokens, states


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 3), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_as_without_drafts(seed: int, counts: list[int], truncated: bool, with_probs: bool) -> None:
    """Tokens, and the random numbers that are left for what follows; whatever the drafts' distribution was."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 2, (sum(counts) + len(counts), VOCAB)).astype(np.float32))
    temperatures = [float(rng.choice([0, 0.5, 1.3])) for _ in counts]
    seeds = [int(rng.integers(100)) for _ in counts]
    options = {}
    if truncated:
        options["top_k"] = torch.from_numpy(rng.integers(1, VOCAB + 1, len(counts)).astype(np.int32))
        options["top_p"] = torch.from_numpy(rng.uniform(0.3, 1, len(counts)).astype(np.float32))
    drafts = [rng.integers(0, VOCAB, count).tolist() for count in counts]
    agreed, _ = one_by_one(logits, drafts, temperatures, seeds, **options)
    for own, right in zip(drafts, agreed, strict=True):  # so that some drafts agree
        if own and rng.random() < 0.7:
            own[0] = right[0]
    want, states = one_by_one(logits, drafts, temperatures, seeds, **options)
    generators, rest = seeded(list(seeds)), np.concatenate(drafts)
    probs = torch.full((len(rest), VOCAB), 1 / VOCAB) if with_probs and len(rest) else None
    output = matching()(speculation(drafts), probs, logits.clone(), sampling(temperatures, generators, **options))
    tokens, _ = MatchingSampler.parse_output(output.sampled_token_ids, VOCAB)
    assert tokens == want
    assert [generators[i].get_state().numpy().tobytes() for i in range(len(counts))] == states


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"])
def test_logprobs(mode: Any) -> None:
    """Of each token, before or after temperature and top-k; as without drafts."""
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(0, 2, (5, VOCAB)).astype(np.float32))
    temperatures, options = [0.7, 0.0], {"max_num_logprobs": 2}
    top_k = torch.tensor([4, VOCAB], dtype=torch.int32)
    drafts = [[0, 0], [int(logits[3].argmax())]]
    drafts[0][0] = one_by_one(logits, drafts, temperatures, [1, 2], top_k=top_k)[0][0][0]
    metadata = sampling(temperatures, seeded([1, 2]), top_k=top_k, **options)
    sampler = matching(logprobs_mode=mode)
    output = sampler(speculation(drafts), None, logits.clone(), metadata)
    tokens, shown = MatchingSampler.parse_output(
        output.sampled_token_ids, VOCAB, logprobs_tensors=output.logprobs_tensors
    )
    assert shown is not None
    scores = logits.clone()
    if mode.startswith("processed"):
        scores[:3] /= 0.7
        scores[:3][scores[:3] < scores[:3].topk(4).values[:, -1:]] = float("-inf")
    if mode.endswith("logprobs"):
        scores = scores.log_softmax(1)
    rows = [*range(len(tokens[0])), *range(3, 3 + len(tokens[1]))]
    want = [float(scores[row, token]) for row, token in zip(rows, [*tokens[0], *tokens[1]], strict=True)]
    assert len(rows) >= 4
    assert shown.logprobs[:, 0].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("sampled_drafts", [False, True])
def test_tokens_of_requests_without_a_seed_are_distributed_as_the_model_says(sampled_drafts: bool) -> None:
    """20000 requests with one draft; a count of n p is off by more than 5 sqrt(n p) once in 10^6 tests."""
    count = 20000
    torch.manual_seed(0)
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5, 0.3, -2.0, 1.5, 0.1], torch.linspace(-1, 1, VOCAB).tolist()])
    draft = torch.linspace(1, -1, VOCAB).softmax(0)
    drafts = torch.multinomial(draft, count, replacement=True) if sampled_drafts else torch.full((count,), 7)
    probs = draft.expand(count, VOCAB).contiguous() if sampled_drafts else None
    metadata = sampling([0.8] * count, {})
    output = matching()(speculation(drafts[:, None].tolist()), probs, scores.repeat(count, 1), metadata)
    first, second = output.sampled_token_ids.T.long()
    accepted = first == drafts
    assert torch.equal(second == -1, ~accepted)
    want = (scores / 0.8).softmax(1)
    for got, expected in ((first, want[0]), (second[accepted], want[1])):
        counts = torch.bincount(got, minlength=VOCAB)
        assert ((counts - len(got) * expected).abs() < 5 * (len(got) * expected).sqrt()).all()
    rate = torch.minimum(want[0], draft).sum() if sampled_drafts else want[0, 7]
    assert float(accepted.float().mean()) == pytest.approx(float(rate), abs=5 * 0.5 / count**0.5)
