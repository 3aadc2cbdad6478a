"""Every architecture in bfloat16, in W8A8 and split over two ranks; the bounds are those of the tests named below."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import random_prompts
from tests.distributed.rank_models import answers_of, check
from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization.comparison import TOKENS, UNIT_TOLERANCE, VOCABULARY, differences, without_ties
from tests.quantization.writers_compressed import SCHEMES
from tests.reference import torch_reference
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE
from tests.zoo.family import families
from tests.zoo.models import made, quantized

NAMES = list(families())
QUICK = [pytest.param(name, marks=pytest.mark.slow if family.alike else ()) for name, family in families().items()]

# Those of tests/reference/test_bfloat16.py, where they are explained.
LARGER: dict[str, Any] = {"vocab_size": 509, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
LARGER |= {"num_attention_heads": 8, "initializer_range": 0.06}


@pytest.mark.parametrize("name", QUICK)
def test_bfloat16_is_no_further_from_float32_than_torch(name: str) -> None:
    family = families()[name]
    options = dict(next(iter(family.cases.values()))) | LARGER | dict(family.in_16_bits)
    model = made(name, options, dtype=torch.bfloat16)
    prompts = random_prompts((2, 33, 100, 200), LARGER["vocab_size"])
    with engine(model.folder, dtype="bfloat16") as llm:
        outputs = greedy(llm, prompts, 24, logprobs=-1, prompt_logprobs=-1)
    exact, rounded = model.reference(), model.reference(torch.bfloat16)
    ours, torches = [], []
    for prompt, tokens, output in zip(prompts, token_ids(outputs), outputs, strict=True):
        rows = [*output.prompt_logprobs, *output.outputs[0].logprobs]
        found = distributions(rows, LARGER["vocab_size"])
        wanted, other = (
            torch.log_softmax(torch_reference.logits(reference, prompt + tokens)[:-1], -1).numpy()
            for reference in (exact, rounded)
        )
        ours.append(np.abs(found - wanted).mean(-1))
        torches.append(np.abs(other - wanted).mean(-1))
    our_error, torch_error = (np.concatenate(errors).mean() for errors in (ours, torches))
    assert torch_error / 10 < our_error <= torch_error


@pytest.mark.parametrize("name", QUICK)
def test_w8a8(name: str) -> None:
    """As tests/quantization/test_quantized_models.py does."""
    folder, reference = quantized(name, SCHEMES["w8a8 dynamic"])
    prompts, answers = without_ties(reference, 2 * UNIT_TOLERANCE)
    with engine(folder, max_model_len=64) as llm:
        outputs = greedy(llm, prompts, TOKENS, prompt_logprobs=-1)
    off = differences([distributions(output.prompt_logprobs, VOCABULARY) for output in outputs], answers)
    assert off.max() < UNIT_TOLERANCE
    assert np.median(off) < LOGPROB_TOLERANCE
    assert token_ids(outputs) == [answer.tokens for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks(name: str) -> None:
    """As tests/distributed/test_tensor_parallel.py does."""
    family = families()[name]
    model = made(name, dict(next(iter(family.cases.values()))))
    prompts, answers = without_ties(model.reference(), LEAST_MARGIN)
    found = answers_of(model.folder, prompts, tensor_parallel_size=family.tensor_parallel)
    check(*found, answers, LOGPROB_TOLERANCE)
