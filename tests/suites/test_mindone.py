"""Models of MindSpore One through vLLM's engine: their answers are those of transformers, and of our own models.

`make test-suites` runs this, in an environment that has mindone. Logits agree as those of our own models do
(torch_reference.py); tokens are the same wherever rounding cannot decide, which is asserted of every case.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization.comparison import UNIT_TOLERANCE
from tests.reference.torch_reference import LOGPROB_TOLERANCE
from tests.suites.answers import (
    LENGTHS,
    TOKENS,
    answers_of,
    check,
    check_our_own,
    check_preemption,
    check_prefixes,
    check_random_weights,
)

SOURCE: dict[str, Any] = {"model_source": "mindone"}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
WINDOWS = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}

# Family, config, seed of the weights.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "gemma": ("gemma", {"head_dim": 32}, 0),
    "gemma2, caps and windows": (
        "gemma2",
        {"sliding_window": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0, "head_dim": 16},
        0,
    ),
    "glm": ("glm", {"head_dim": 16, "attention_bias": True}, 1),
    "glm4": ("glm4", {"head_dim": 16}, 0),
    "granite": ("granite", {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}, 2),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}, 0),
    "llama, yarn, tied, one KV head": (
        "llama",
        {"rope_parameters": YARN, "tie_word_embeddings": True, "num_key_value_heads": 1},
        0,
    ),
    "llama, head size 20": ("llama", {"head_dim": 20}, 0),
    "mistral, window": ("mistral", {"sliding_window": 24}, 2),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 1),
    "olmo2": ("olmo2", {}, 0),
    "phi3, window": ("phi3", {"sliding_window": 24}, 0),
    "qwen2": ("qwen2", {}, 1),
    "qwen2, tied, some windows": ("qwen2", WINDOWS | {"tie_word_embeddings": True}, 0),
    "qwen3": ("qwen3", {"head_dim": 32}, 0),
    "qwen3, tied, yarn": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": YARN}, 0),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 48, "head_dim": 16}, 0),
}


def folder_of(case: str) -> Path:
    family, options, seed = CASES[case]
    return checkpoint(family, seed, **options)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def test_as_transformers_and_as_our_own(case: str) -> None:
    check(folder_of(case), SOURCE)
    check_our_own(folder_of(case))


def test_logits_of_prompts() -> None:
    """Of every position of a prompt, which mindone's own head and scaling give."""
    (answer,) = answers_of(folder_of("granite"), (150,))
    with engine(folder_of("granite"), additional_config=SOURCE) as llm:
        (output,) = greedy(llm, random_prompts((150,)), 1, prompt_logprobs=-1)
    exact = answer.prompt_logits.log_softmax(-1).numpy()
    ours = distributions(output.prompt_logprobs, exact.shape[1])
    np.testing.assert_allclose(ours, exact, rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("case", ["llama, llama3", "qwen2, tied, some windows", "qwen3"], indirect=True)
def test_prefixes_are_cached(case: str) -> None:
    check_prefixes(folder_of(case), SOURCE)


@pytest.mark.parametrize("case", ["llama, llama3", "qwen2", "qwen3"], indirect=True)
def test_preempted(case: str) -> None:
    check_preemption(folder_of(case), SOURCE)


# One KV head is on both ranks; 211 tokens of the vocabulary are not divided by two.
SPLIT = ["llama, llama3", "llama, yarn, tied, one KV head", "qwen2", "qwen3", "mixtral"]


@pytest.mark.parametrize("case", SPLIT, indirect=True)
def test_two_ranks(case: str) -> None:
    with engine(folder_of(case), additional_config=SOURCE, tensor_parallel_size=2) as llm:
        outputs = token_ids(greedy(llm, random_prompts(LENGTHS), TOKENS))
    assert outputs == [answer.tokens for answer in answers_of(folder_of(case))]


def test_a_cache_of_int8() -> None:
    """As in our own model, which rounds the same keys and values."""
    prompts = random_prompts((33, 100))
    found = []
    for source in (SOURCE, {}):
        with engine(folder_of("qwen3"), additional_config=source, kv_cache_dtype="int8_per_token_head") as llm:
            outputs = greedy(llm, prompts, 8, prompt_logprobs=-1)
        found.append(np.concatenate([distributions(output.prompt_logprobs, 211) for output in outputs]))
    # A value in the middle between two integers goes either way, by its last bit: few do, and none by much.
    off = np.abs(found[0] - found[1])
    assert np.median(off) < LOGPROB_TOLERANCE and off.max() < UNIT_TOLERANCE


def test_random_weights() -> None:
    check_random_weights(folder_of("qwen2"), SOURCE)


def test_nothing_else_is_changed() -> None:
    """mindone's modules see other operators and names than those that MindSpore and transformers have."""
    import mindspore
    import transformers.utils

    with engine(folder_of("qwen2"), additional_config=SOURCE) as llm:
        greedy(llm, random_prompts((5,)), 2)
    rope = sys.modules["mindone.transformers.modeling_rope_utils"]
    assert rope.mint.arange.__module__ == "vllm_ms_models.suites.mindone.operators"
    assert mindspore.mint.arange.__module__.startswith("mindspore.")
    assert mindspore.nn.Dense.__module__.startswith("mindspore.")
    assert not hasattr(transformers.utils, "FLAX_WEIGHTS_NAME")


def test_a_mask_is_an_error() -> None:
    """What attention would have to do otherwise is not left out in silence."""
    from vllm_ms_models.suites.mindone.attention import attend

    for options in ({"attention_mask": 1}, {"attention_mask": None, "s_aux": 1}):
        with pytest.raises(ValueError, match=f"calls attention with {[*options][-1]}, which is not supported"):
            attend(None, None, None, None, **options)
