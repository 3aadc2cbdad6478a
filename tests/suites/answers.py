"""What models of every suite are asked, and how their answers are held against transformers' and our own models'."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import random_prompts
from tests.engines import counter, distributions, engine, greedy, token_ids
from tests.reference import torch_reference
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE, Answer

TOKENS = 48
LENGTHS = (1, 5, 32, 33, 100, 150)
CHUNK = 48  # tokens in a step: longer prompts are read in pieces, together with others


def answers_of(folder: Path, lengths: Sequence[int] = LENGTHS, tokens: int = TOKENS) -> list[Answer]:
    """transformers'; no decision among them is one that rounding could take."""
    model = torch_reference.load(folder)
    answers = [torch_reference.greedy(model, prompt, tokens) for prompt in random_prompts(lengths)]
    assert min(answer.margin for answer in answers) > LEAST_MARGIN, "another seed"
    return answers


def check(folder: Path, source: dict[str, Any], lengths: Sequence[int] = LENGTHS, tokens: int = TOKENS) -> None:
    """All prompts at once, in chunks: every log-probability of the vocabulary, and the tokens."""
    answers = answers_of(folder, lengths, tokens)
    with engine(folder, additional_config=source, max_num_batched_tokens=CHUNK) as llm:
        outputs = greedy(llm, random_prompts(lengths), tokens, logprobs=-1)
    assert token_ids(outputs) == [answer.tokens for answer in answers]
    for output, answer in zip(outputs, answers, strict=True):
        exact = answer.token_logits.log_softmax(-1).numpy()
        ours = distributions(output.outputs[0].logprobs, exact.shape[1])
        np.testing.assert_allclose(ours, exact, rtol=0, atol=LOGPROB_TOLERANCE)


def check_our_own(folder: Path) -> None:
    """Our model of the same checkpoint chooses the same tokens."""
    with engine(folder) as llm:
        found = token_ids(greedy(llm, random_prompts(LENGTHS), TOKENS))
    assert found == [answer.tokens for answer in answers_of(folder)]


def check_prefixes(folder: Path, source: dict[str, Any]) -> None:
    """What a first run left in the cache serves a second one, whose prompts go on otherwise."""
    prompts = random_prompts((100, 150))
    longer = [[*prompt, 7, 9, 11] for prompt in prompts]
    model = torch_reference.load(folder)
    with engine(folder, additional_config=source, disable_log_stats=False) as llm:
        greedy(llm, prompts, 1)
        before = counter(llm, "vllm:prefix_cache_hits")
        outputs = greedy(llm, longer, TOKENS)
        hits = counter(llm, "vllm:prefix_cache_hits") - before
    assert hits >= 96 + 128  # whole blocks of 32
    for prompt, tokens in zip(longer, token_ids(outputs), strict=True):
        answer = torch_reference.greedy(model, prompt, TOKENS)
        assert answer.margin > LEAST_MARGIN
        assert tokens == answer.tokens


def check_preemption(folder: Path, source: dict[str, Any]) -> None:
    """A cache for barely more than one sequence: others are thrown out midway and computed anew."""
    blocks = 1 + 9  # vLLM keeps one for itself; a sequence of 256 tokens takes 8
    options: dict[str, Any] = {"enable_prefix_caching": False, "disable_log_stats": False}
    with engine(folder, additional_config=source, num_gpu_blocks_override=blocks, **options) as llm:
        outputs = token_ids(greedy(llm, random_prompts(LENGTHS), TOKENS))
        assert counter(llm, "vllm:num_preemptions") > 0
    assert outputs == [answer.tokens for answer in answers_of(folder)]


def check_random_weights(folder: Path, source: dict[str, Any]) -> None:
    """Those of `--load-format dummy` give numbers."""
    with engine(folder, additional_config=source, load_format="dummy") as llm:
        (output,) = greedy(llm, random_prompts((9,)), 4, logprobs=1)
    assert all(math.isfinite(entry.logprob) for step in output.outputs[0].logprobs for entry in step.values())
