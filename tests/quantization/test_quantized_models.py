"""Quantized checkpoints of every format through vLLM, against torch models that do the same arithmetic in NumPy.

With activations in floats, sums differ in their order alone, and the bound is that of unquantized models. With
activations rounded to int8 it is comparison.py's, though none of the models here needs it: the largest difference of
all was 4e-6.
"""

import numpy as np
import pytest

from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization import writers_compressed, writers_others
from tests.quantization.comparison import TOKENS, UNIT_TOLERANCE, VOCABULARY, differences, without_ties
from tests.quantization.models import written
from tests.quantization.writers import Scheme
from tests.reference.torch_reference import LOGPROB_TOLERANCE

AS_INT8 = {f"{name}, as int8": scheme for name, scheme in writers_others.FP8_AS_INT8.items()}
SCHEMES: dict[str, Scheme] = {
    **{f"compressed-tensors {name}": scheme for name, scheme in writers_compressed.SCHEMES.items()},
    **writers_others.SCHEMES,
    **AS_INT8,
}


# An engine takes seconds to start: the quick tests take the families in turns, `make test-all` both for each scheme.
CASES = [
    pytest.param(name, family, id=f"{name}-{family}", marks=() if (number + turn) % 2 else pytest.mark.slow)
    for number, name in enumerate(SCHEMES)
    for turn, family in enumerate(("qwen2", "llama"))
]


@pytest.mark.feature("offline LLM", families=["quantized"])
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
