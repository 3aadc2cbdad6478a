"""Every architecture against its torch model in float32: the same greedy tokens, the same log-probabilities.

tests/reference/ has more of those that came first; here all of the registry is gone through, on three configs at least.
"""

import numpy as np
import pytest
import torch

from tests.checkpoints import random_prompts
from tests.engines import distributions, engine, greedy, token_ids
from tests.reference import torch_reference
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE, Answer
from tests.zoo.family import families
from tests.zoo.models import made
from vllm_ms_models import registry

TOKENS = 48
LENGTHS = (1, 33, 70)

CASES = [
    pytest.param(name, case, id=f"{name}-{case}", marks=pytest.mark.slow if number else ())
    for name, family in families().items()
    for number, case in enumerate(family.cases)
]


def decided(model: torch.nn.Module, vocabulary: int) -> tuple[list[list[int]], list[Answer]]:
    """A prompt of each length after which no token is chosen by less than rounding can change."""
    prompts, answers = [], []
    for length in LENGTHS:
        for seed in range(100):
            (prompt,) = random_prompts([length], vocabulary, seed)
            answer = torch_reference.greedy(model, prompt, TOKENS)
            if answer.margin > LEAST_MARGIN:
                break
        else:
            raise AssertionError("the model cannot decide")
        prompts.append(prompt)
        answers.append(answer)
    return prompts, answers


@pytest.mark.parametrize(("name", "case"), CASES)
def test_tokens_and_logprobs(name: str, case: str) -> None:
    model = made(name, dict(families()[name].cases[case]))
    reference = model.reference()
    vocabulary = reference.config.vocab_size
    prompts, answers = decided(reference, vocabulary)
    with engine(model.folder) as llm:
        outputs = greedy(llm, prompts, TOKENS, logprobs=-1, prompt_logprobs=-1)
    assert token_ids(outputs) == [answer.tokens for answer in answers]
    for answer, output in zip(answers, outputs, strict=True):
        found = distributions([*output.prompt_logprobs, *output.outputs[0].logprobs], vocabulary)
        wanted = torch.log_softmax(torch.cat((answer.prompt_logits, answer.token_logits)), -1).numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=LOGPROB_TOLERANCE)


def test_every_architecture_has_three_cases() -> None:
    covered = {architecture for family in families().values() for architecture in family.architectures}
    assert covered >= set(registry.BUILT_IN) - registry.ENCODERS - registry.MULTIMODAL  # tests/multimodal
    assert [name for name, family in families().items() if len(family.cases) < 3] == []
