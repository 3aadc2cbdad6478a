"""Every case of the zoo's decoders with parts of their own at the ends, in two stages of a pipeline."""

import pytest

from tests.distributed.rank_models import answers_of, check
from tests.quantization.comparison import without_ties
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE
from tests.zoo.family import families
from tests.zoo.models import made

NAMES = ("opt", "gemma2", "gemma3", "granite", "internlm2", "olmo2")
CASES = [(name, case) for name in NAMES for case in families()[name].cases]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), CASES)
def test_two_stages(name: str, case: str) -> None:
    """As tests/distributed/test_pipeline_parallel.py does."""
    model = made(name, dict(families()[name].cases[case]))
    prompts, answers = without_ties(model.reference(), LEAST_MARGIN)
    found = answers_of(model.folder, prompts, pipeline_parallel_size=2, max_num_batched_tokens=16)
    check(*found, answers, LOGPROB_TOLERANCE)
