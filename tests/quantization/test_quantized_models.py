"""Quantized checkpoints of every format through vLLM, against torch models that do the same arithmetic in NumPy.

Weights only: sums of floats differ in order alone, and the bound is that of unquantized models. With activations
rounded to int8, a difference in the last bit of a float now and then moves an activation across the middle between two
integers. That is one unit of one input, and no fault: `UNIT_TOLERANCE` allows for a few of them, and the median of the
differences, which they do not reach, must be as small as without.
"""

import numpy as np
import pytest
import torch

from tests.checkpoints import random_prompts
from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization import writers_compressed
from tests.quantization.models import written
from tests.quantization.writers import Scheme
from tests.reference import torch_reference
from tests.reference.torch_reference import LOGPROB_TOLERANCE

TOKENS = 12
LENGTHS = (1, 20, 45)
VOCABULARY = 211
UNIT_TOLERANCE = 0.1
SCHEMES: dict[str, Scheme] = {
    f"{format}: {name}": scheme
    for format, schemes in {"compressed-tensors": writers_compressed.SCHEMES}.items()
    for name, scheme in schemes.items()
}


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("name", SCHEMES)
def test_tokens_and_logprobs(name: str, family: str) -> None:
    scheme = SCHEMES[name]
    tolerance = UNIT_TOLERANCE if scheme.int8_inputs else LOGPROB_TOLERANCE
    model = written(family, scheme)
    prompts = random_prompts(LENGTHS)
    expected = [torch_reference.greedy(model.model, prompt, TOKENS) for prompt in prompts]
    with engine(model.folder, max_model_len=128, env={"VLLM_MS_KERNELS": "reference"}) as llm:
        outputs = greedy(llm, prompts, TOKENS, prompt_logprobs=-1)
    for output, answer, tokens in zip(outputs, expected, token_ids(outputs), strict=True):
        found = distributions(output.prompt_logprobs, VOCABULARY)
        want = torch.log_softmax(answer.prompt_logits, -1).numpy()
        np.testing.assert_allclose(found, want, rtol=0, atol=tolerance)
        if len(want):
            assert np.median(np.abs(found - want)) < LOGPROB_TOLERANCE
        assert answer.margin > 2 * tolerance, "a tie: choose another seed"
        assert tokens == answer.tokens
