"""Quantized DeepSeek: every linear of the attention in a format, kv_b_proj among them, which is absorbed in floats.

With activations in floats, that is the arithmetic of the torch model; W8A8 differs in kv_b_proj alone, whose inputs are
not rounded here.
"""

from typing import Any

import numpy as np
import pytest

from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization import writers_compressed, writers_others
from tests.quantization.comparison import TOKENS, VOCABULARY, differences, without_ties
from tests.quantization.models import written
from tests.reference.torch_reference import LOGPROB_TOLERANCE

SIZES: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 0,
}
SCHEMES = {
    "fp8 in blocks": writers_others.FP8["fp8 in blocks"],
    "compressed-tensors fp8, by channel": writers_others.FP8["compressed-tensors fp8, by channel"],
    "awq": writers_others.WORDS["awq"],
    "gptq": writers_others.WORDS["gptq"],
    "gptq, activation order": writers_others.WORDS["gptq, activation order"],
    "w8a16": writers_compressed.SCHEMES["w8a16"],
    "packed w4a16, asymmetric": writers_compressed.SCHEMES["packed w4a16, asymmetric"],
}


@pytest.mark.parametrize("name", SCHEMES)
def test_tokens_and_logprobs(name: str) -> None:
    model = written("deepseek_v3", SCHEMES[name], **SIZES)
    prompts, answers = without_ties(model.model, 2 * LOGPROB_TOLERANCE)
    with engine(model.folder, max_model_len=64) as llm:
        outputs = greedy(llm, prompts, TOKENS, prompt_logprobs=-1)
        found = [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]
    assert differences(found, answers).max() < LOGPROB_TOLERANCE
    assert token_ids(outputs) == [answer.tokens for answer in answers]


def test_activations_rounded_by_token() -> None:
    """Off by what rounding the latents to int8 would change, in one linear of seven."""
    model = written("deepseek_v3", writers_compressed.SCHEMES["w8a8 dynamic"], **SIZES)
    prompts, answers = without_ties(model.model, 0.0)
    with engine(model.folder, max_model_len=64) as llm:
        outputs = greedy(llm, prompts, 1, prompt_logprobs=-1)
    off = differences([distributions(output.prompt_logprobs, VOCABULARY) for output in outputs], answers)
    assert np.median(off) < 0.05
    assert off.max() < 0.5


def test_activations_of_a_fixed_scale_are_refused() -> None:
    model = written("deepseek_v3", writers_compressed.SCHEMES["w8a8 static"], **SIZES)
    with (
        pytest.raises(ValueError, match=r"kv_b_proj is quantized for activations of a fixed scale"),
        engine(model.folder, max_model_len=64),
    ):
        pass
