"""Speculation changes no token: n-grams, draft models and MTP, greedy and sampled with seeds, in ragged batches.

Logits of several tokens at once differ from those of one by rounding (1e-5 of these models' logits), which decides
where the two best tokens, or a random number and a boundary between two tokens, are closer than that: once in some
10^4 tokens, and for fixed seeds always or never.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import counter, engine
from tests.speculation.mtp import with_draft_layer

COMMON: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "detokenize": False}
SAMPLING = [
    SamplingParams(temperature=0, **COMMON),
    SamplingParams(temperature=0, logprobs=3, **COMMON),
    SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.2, min_tokens=5, **COMMON),
    SamplingParams(temperature=0.7, seed=3, **COMMON),
    SamplingParams(temperature=1.0, seed=4, top_k=20, top_p=0.9, logprobs=2, **COMMON),
    SamplingParams(temperature=1.2, seed=5, presence_penalty=0.5, **COMMON),
    SamplingParams(temperature=0.3, seed=6, allowed_token_ids=list(range(40)), **COMMON),
]
# Longer than the 48 tokens that are read at once, and with beginnings in common, which are cached.
LONG = random_prompts([100])[0]
PROMPTS = [LONG, LONG[:70], *random_prompts([3, 17, 40, 1, 90], seed=1)]


@dataclass(frozen=True)
class Tokens:
    """What one request got: tokens, and of those that asked for it the log-probability of each."""

    ids: list[int]
    logprobs: list[float] | None


def generate(
    folder: Path, speculation: Mapping[str, Any] | None = None, **options: Any
) -> tuple[list[Tokens], int, int]:
    """Every prompt with its sampling, twice (the second time prefixes are cached); drafts proposed and accepted."""
    if speculation is not None:
        options["speculative_config"] = dict(speculation)
    result = []
    with engine(folder, max_num_batched_tokens=48, max_num_seqs=4, disable_log_stats=False, **options) as llm:
        for _ in range(2):
            prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
            for output in llm.generate(prompts, SAMPLING, use_tqdm=False):
                one = output.outputs[0]
                ids = list(one.token_ids)
                shown = one.logprobs and [row[token].logprob for row, token in zip(one.logprobs, ids, strict=True)]
                result.append(Tokens(ids, shown))
        assert counter(llm, "vllm:prefix_cache_hits") > 0
        assert bool(counter(llm, "vllm:num_preemptions")) == ("num_gpu_blocks_override" in options)
        proposed = counter(llm, "vllm:spec_decode_num_draft_tokens")
        return result, proposed, counter(llm, "vllm:spec_decode_num_accepted_tokens")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("speculation")
    return {
        "qwen2": checkpoint("qwen2"),
        "windowed": checkpoint("qwen2", sliding_window=24, use_sliding_window=True, max_window_layers=1),
        "agreeing": with_draft_layer(root / "agreeing", residual=0),
        "mostly": with_draft_layer(root / "mostly", residual=0.03),
        "random": with_draft_layer(root / "random"),
    }


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> Iterator[Any]:
    """Without speculation, once for each model."""
    known: dict[str, list[Tokens]] = {}

    def ask(name: str) -> list[Tokens]:
        if name not in known:
            known[name] = generate(folders[name])[0]
        return known[name]

    yield ask


NGRAM = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    # the model, its speculation, and the least part of its drafts that is to be accepted; some never are
    "ngram 3": ("agreeing", {**NGRAM, "num_speculative_tokens": 3}, 0.05),
    "ngram 1, windows": ("windowed", {**NGRAM, "num_speculative_tokens": 1}, 0.001),
    "the model as its own draft 2": ("qwen2", {"method": "draft_model", "num_speculative_tokens": 2}, 0.2),
    "another draft 1": ("qwen2", {"method": "draft_model", "model": "llama", "num_speculative_tokens": 1}, 0),
    "sampled drafts 3": (
        "qwen2",
        {"method": "draft_model", "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"},
        0.1,
    ),
    "mtp 1": ("agreeing", {"method": "mtp", "num_speculative_tokens": 1}, 0.4),
    "mtp 2": ("agreeing", {"method": "mtp", "num_speculative_tokens": 2}, 0.3),
    "mtp 2, some right": ("mostly", {"method": "mtp", "num_speculative_tokens": 2}, 0.05),
    "mtp 3, wrong": ("random", {"method": "mtp", "num_speculative_tokens": 3}, 0),
}
SLOW = {"ngram 1, windows", "another draft 1", "mtp 3, wrong"}


@pytest.mark.parametrize("case", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
def test_tokens_are_those_without_speculation(case: str, folders: dict[str, Path], plain: Any) -> None:
    name, speculation, least = CASES[case]
    if speculation["method"] == "draft_model":
        draft = speculation.get("model")
        speculation = speculation | {"model": str(folders[name] if draft is None else checkpoint(draft))}
    got, proposed, accepted = generate(folders[name], speculation)
    for index, (ours, want) in enumerate(zip(got, plain(name), strict=True)):
        assert ours.ids == want.ids, f"request {index}"
        if want.logprobs is not None:
            assert ours.logprobs == pytest.approx(want.logprobs, abs=1e-4)
    assert least * proposed <= accepted < proposed


@pytest.mark.slow
def test_preempted_requests(folders: dict[str, Path], plain: Any) -> None:
    """A cache for little more than one sequence: others are thrown out midway and computed anew, drafts too."""
    speculation = {"method": "mtp", "num_speculative_tokens": 2}
    got, _, accepted = generate(folders["mostly"], speculation, num_gpu_blocks_override=1 + 8)
    assert got == [Tokens(want.ids, ours.logprobs) for ours, want in zip(got, plain("mostly"), strict=True)]
    assert accepted > 0


@pytest.mark.parametrize(("name", "draft"), [("qwen2", "windowed"), ("windowed", "qwen2")])
def test_a_draft_that_needs_another_cache_is_refused(name: str, draft: str, folders: dict[str, Path]) -> None:
    """vLLM would let it write over the model's."""
    speculation = {"model": str(folders[draft]), "num_speculative_tokens": 1}
    with pytest.raises(ValueError, match=r"their attention layers need different caches.*use the method ngram"):
        generate(folders[name], speculation)


def greedy_acceptance(folder: Path, speculation: dict[str, Any], prompts: list[list[int]], tokens: int) -> float:
    with engine(folder, speculative_config=speculation, max_num_batched_tokens=48, disable_log_stats=False) as llm:
        sampling = SamplingParams(**COMMON | {"max_tokens": tokens, "temperature": 0})
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        proposed = counter(llm, "vllm:spec_decode_num_draft_tokens")
        return counter(llm, "vllm:spec_decode_num_accepted_tokens") / proposed


@pytest.mark.parametrize("method", ["draft_model", "mtp"])
def test_a_draft_that_agrees_is_always_accepted(method: str, folders: dict[str, Path]) -> None:
    """All of 2 drafts a step: one wrong row of a draft's cache would show.

    33 tokens after the first are 11 steps of 2 drafts and the model's own token, none cut off.
    """
    folder = folders["agreeing" if method == "mtp" else "qwen2"]
    speculation = {"method": method, "num_speculative_tokens": 2}
    if method == "draft_model":
        speculation["model"] = str(folder)
    assert greedy_acceptance(folder, speculation, PROMPTS, 34) == 1.0
