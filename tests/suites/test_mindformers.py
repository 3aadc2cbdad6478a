"""Models of MindSpore Transformers through vLLM's engine: their answers are transformers', and those of our own models.

`make test-suites` runs this, in an environment that has mindformers. Tokens are the same wherever rounding cannot
decide, which is asserted of every case.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import DEEPSEEK, checkpoint, random_prompts
from tests.engines import counter, distributions, engine, greedy, token_ids
from tests.reference import torch_reference
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE, Answer
from tests.zoo.families.glm4_moe import EXPERTS

SOURCE: dict[str, Any] = {"model_source": "mindformers"}
TOKENS = 48
LENGTHS = (1, 5, 32, 33, 100, 150)
CHUNK = 48  # tokens in a step: prompts of 100 and 150 are read in pieces, together with others

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

# Family, config, seed of the weights.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "deepseek_v3": ("deepseek_v3", DEEPSEEK, 0),
    "deepseek_v3, yarn, groups": (
        "deepseek_v3",
        DEEPSEEK | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "n_group": 4, "topk_group": 2},
        1,
    ),
    "glm4, biases": ("glm4", {"head_dim": 16, "attention_bias": True}, 0),
    "glm4_moe, norms of heads": ("glm4_moe", EXPERTS | {"use_qk_norm": True}, 0),
    "qwen2": ("qwen2", {}, 1),
    "qwen2, tied, yarn, one KV head": (
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": YARN, "num_key_value_heads": 1},
        1,
    ),
    "qwen3": ("qwen3", {"head_dim": 32}, 0),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}, 3),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}, 0),
}


def folder_of(case: str) -> Path:
    family, options, seed = CASES[case]
    return checkpoint(family, seed, **options)


def answers_of(case: str, lengths: tuple[int, ...] = LENGTHS) -> list[Answer]:
    """transformers'; no decision among them is one that rounding could take."""
    model = torch_reference.load(folder_of(case))
    answers = [torch_reference.greedy(model, prompt, TOKENS) for prompt in random_prompts(lengths)]
    assert min(answer.margin for answer in answers) > LEAST_MARGIN, "another seed"
    return answers


@pytest.mark.parametrize("case", CASES)
def test_as_transformers_and_as_our_own(case: str) -> None:
    """All prompts at once, in chunks: every log-probability of the vocabulary, and the tokens."""
    folder, prompts, answers = folder_of(case), random_prompts(LENGTHS), answers_of(case)
    with engine(folder, additional_config=SOURCE, max_num_batched_tokens=CHUNK) as llm:
        outputs = greedy(llm, prompts, TOKENS, logprobs=-1)
    assert token_ids(outputs) == [answer.tokens for answer in answers]
    for output, answer in zip(outputs, answers, strict=True):
        exact = answer.token_logits.log_softmax(-1).numpy()
        ours = distributions(output.outputs[0].logprobs, exact.shape[1])
        np.testing.assert_allclose(ours, exact, rtol=0, atol=LOGPROB_TOLERANCE)
    with engine(folder) as llm:
        assert token_ids(greedy(llm, prompts, TOKENS)) == token_ids(outputs)


@pytest.mark.parametrize("case", ["deepseek_v3", "qwen2", "qwen3"])
def test_prefixes_are_cached(case: str) -> None:
    """What a first run left in the cache serves a second one, whose prompts go on otherwise."""
    prompts = random_prompts((100, 150))
    longer = [[*prompt, 7, 9, 11] for prompt in prompts]
    model = torch_reference.load(folder_of(case))
    with engine(folder_of(case), additional_config=SOURCE, disable_log_stats=False) as llm:
        greedy(llm, prompts, 1)
        before = counter(llm, "vllm:prefix_cache_hits")
        outputs = greedy(llm, longer, TOKENS)
        hits = counter(llm, "vllm:prefix_cache_hits") - before
    assert hits >= 96 + 128  # whole blocks of 32
    for prompt, tokens in zip(longer, token_ids(outputs), strict=True):
        answer = torch_reference.greedy(model, prompt, TOKENS)
        assert answer.margin > LEAST_MARGIN
        assert tokens == answer.tokens


@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_preempted(case: str) -> None:
    """A cache for barely more than one sequence: others are thrown out midway and computed anew."""
    blocks = 1 + 9  # vLLM keeps one for itself; a sequence of 256 tokens takes 8
    options: dict[str, Any] = {
        "num_gpu_blocks_override": blocks,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    with engine(folder_of(case), additional_config=SOURCE, **options) as llm:
        outputs = token_ids(greedy(llm, random_prompts(LENGTHS), TOKENS))
        assert counter(llm, "vllm:num_preemptions") > 0
    assert outputs == [answer.tokens for answer in answers_of(case)]


def test_half_precision() -> None:
    """As near to transformers in float32 as our own model of the same float16 is, but for the last bits."""
    (answer,) = answers_of("qwen3", (100,))
    exact = answer.prompt_logits.log_softmax(-1).numpy()
    errors = []
    for source in (SOURCE, {}):
        with engine(folder_of("qwen3"), additional_config=source, dtype="float16") as llm:
            (output,) = greedy(llm, random_prompts((100,)), 1, prompt_logprobs=-1)
        errors.append(np.abs(distributions(output.prompt_logprobs, exact.shape[1]) - exact).mean())
    assert errors[0] < 2 * errors[1]  # mindformers also rounds between the gate and its product


def test_random_weights() -> None:
    with engine(folder_of("qwen2"), additional_config=SOURCE, load_format="dummy") as llm:
        (output,) = greedy(llm, random_prompts((9,)), 4, logprobs=1)
    assert all(math.isfinite(entry.logprob) for step in output.outputs[0].logprobs for entry in step.values())
