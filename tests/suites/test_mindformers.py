"""Models of MindSpore Transformers through vLLM's engine: their answers are transformers', and those of our own models.

`make test-suites` runs this, in an environment that has mindformers. Tokens are the same wherever rounding cannot
decide, which is asserted of every case.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import DEEPSEEK, checkpoint, random_prompts
from tests.engines import distributions, engine, greedy
from tests.suites.answers import (
    answers_of,
    check,
    check_our_own,
    check_preemption,
    check_prefixes,
    check_random_weights,
)
from tests.zoo.families.glm4_moe import EXPERTS

SOURCE: dict[str, Any] = {"model_source": "mindformers"}

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


@pytest.mark.parametrize("case", CASES)
def test_as_transformers_and_as_our_own(case: str) -> None:
    check(folder_of(case), SOURCE)
    check_our_own(folder_of(case))


@pytest.mark.parametrize("case", ["deepseek_v3", "qwen2", "qwen3"])
def test_prefixes_are_cached(case: str) -> None:
    check_prefixes(folder_of(case), SOURCE)


@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_preempted(case: str) -> None:
    check_preemption(folder_of(case), SOURCE)


def test_half_precision() -> None:
    """As near to transformers in float32 as our own model of the same float16 is, but for the last bits."""
    (answer,) = answers_of(folder_of("qwen3"), (100,))
    exact = answer.prompt_logits.log_softmax(-1).numpy()
    errors = []
    for source in (SOURCE, {}):
        with engine(folder_of("qwen3"), additional_config=source, dtype="float16") as llm:
            (output,) = greedy(llm, random_prompts((100,)), 1, prompt_logprobs=-1)
        errors.append(np.abs(distributions(output.prompt_logprobs, exact.shape[1]) - exact).mean())
    assert errors[0] < 2 * errors[1]  # mindformers also rounds between the gate and its product


def test_random_weights() -> None:
    check_random_weights(folder_of("qwen2"), SOURCE)
