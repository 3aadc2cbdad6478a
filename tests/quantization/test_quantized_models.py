"""Quantized checkpoints of every format through vLLM, against torch models that do the same arithmetic in NumPy.

With activations in floats, sums differ in their order alone, and the bound is that of unquantized models.

With activations rounded to int8, a difference in the last bit of a float now and then moves an activation across the
middle between two integers. That is one unit of one input, and no fault: `UNIT_TOLERANCE` allows for a few of them (of
the models here none has any: the largest difference of all was 4e-6), and the median of all differences, which they do
not reach, must be as small as without.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.checkpoints import random_prompts
from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization import writers_compressed, writers_others
from tests.quantization.models import written
from tests.quantization.writers import Scheme
from tests.reference import torch_reference
from tests.reference.torch_reference import LOGPROB_TOLERANCE, Answer

TOKENS = 10
LENGTHS = (1, 33, 20)
VOCABULARY = 211
UNIT_TOLERANCE = 0.05
AS_INT8 = {f"{name}, as int8": scheme for name, scheme in writers_others.FP8_AS_INT8.items()}
SCHEMES: dict[str, Scheme] = {
    **{f"compressed-tensors {name}": scheme for name, scheme in writers_compressed.SCHEMES.items()},
    **writers_others.SCHEMES,
    **AS_INT8,
}


def without_ties(model: torch.nn.Module, least: float) -> tuple[list[list[int]], list[Answer]]:
    """A prompt of each length after which no token is chosen by less than `least`, and what the model says."""
    prompts, answers = [], []
    for length in LENGTHS:
        for seed in itertools.count():
            (prompt,) = random_prompts([length], seed=seed)
            answer = torch_reference.greedy(model, prompt, TOKENS)
            if answer.margin > least:
                break
            assert seed < 200, "the model cannot decide"
        prompts.append(prompt)
        answers.append(answer)
    return prompts, answers


def differences(found: Sequence[np.ndarray], answers: Sequence[Answer]) -> np.ndarray:
    wanted = [torch.log_softmax(answer.prompt_logits, -1).numpy() for answer in answers]
    return np.concatenate([np.abs(a - b).reshape(-1) for a, b in zip(found, wanted, strict=True)])


# An engine takes seconds to start: the quick tests take the families in turns, `make test-all` both for each scheme.
CASES = [
    pytest.param(name, family, id=f"{name}-{family}", marks=() if (number + turn) % 2 else pytest.mark.slow)
    for number, name in enumerate(SCHEMES)
    for turn, family in enumerate(("qwen2", "llama"))
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_tokens_and_logprobs(name: str, family: str) -> None:
    scheme = SCHEMES[name]
    tolerance = UNIT_TOLERANCE if scheme.int8_inputs else LOGPROB_TOLERANCE
    model = written(family, scheme)
    prompts, answers = without_ties(model.model, 2 * tolerance)
    options = {"additional_config": {"fp8": "int8"}} if name in AS_INT8 else {}
    with engine(model.folder, max_model_len=64, **options) as llm:
        outputs = greedy(llm, prompts, TOKENS, prompt_logprobs=-1)
        found = [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]
    off = differences(found, answers)
    assert off.max() < tolerance
    assert np.median(off) < LOGPROB_TOLERANCE
    assert token_ids(outputs) == [answer.tokens for answer in answers]
