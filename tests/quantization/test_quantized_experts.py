"""Quantized mixtures of experts through vLLM, as test_quantized_models.py has dense models; and what is refused."""

import numpy as np
import pytest

from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization import writers_compressed, writers_others
from tests.quantization.models import written
from tests.quantization.test_quantized_models import (
    TOKENS,
    UNIT_TOLERANCE,
    VOCABULARY,
    differences,
    without_ties,
)
from tests.quantization.writers import Scheme
from tests.reference.torch_reference import LOGPROB_TOLERANCE

OPTIONS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 56, "norm_topk_prob": True}
SCHEMES: dict[str, Scheme] = {
    name: writers_compressed.SCHEMES[name] for name in ("w8a8 dynamic", "w8a8 static, asymmetric", "packed w4a16")
}
SCHEMES |= {name: writers_others.SCHEMES[name] for name in ("fp8 in blocks", "awq")}


@pytest.mark.parametrize("name", SCHEMES)
def test_tokens_and_logprobs(name: str) -> None:
    scheme = SCHEMES[name]
    tolerance = UNIT_TOLERANCE if scheme.int8_inputs else LOGPROB_TOLERANCE
    model = written("qwen3_moe", scheme, **OPTIONS)
    prompts, answers = without_ties(model.model, 2 * tolerance)
    with engine(model.folder, max_model_len=64) as llm:
        outputs = greedy(llm, prompts, TOKENS, prompt_logprobs=-1)
        found = [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]
    off = differences(found, answers)
    assert off.max() < tolerance
    assert np.median(off) < LOGPROB_TOLERANCE
    assert token_ids(outputs) == [answer.tokens for answer in answers]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gptq, activation order", "experts.0.gate_proj has its inputs in activation order, which is not supported"),
        ("golden stick w8a8", "experts.0.gate_proj has an input_scale for each input, which is not"),
    ],
)
def test_what_needs_more_than_a_product_is_refused(name: str, reason: str) -> None:
    model = written("qwen3_moe", writers_others.SCHEMES[name], **OPTIONS)
    with pytest.raises(Exception, match=reason), engine(model.folder, max_model_len=64):
        pass
