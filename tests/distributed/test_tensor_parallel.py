"""Models split over processes by vLLM's own multiprocess executor, against torch models and against one process.

Ranks add their sums of products in another order than one process does, so that the bounds are those of any two
float32 implementations (torch_reference.py). W8A8 with activations of a fixed scale multiplies the same integers,
however they are split; rounded by token, each rank takes the largest magnitude among its own inputs of a row-parallel
linear (as vLLM's do), a finer rounding than one process has: the torch model does the same. In both, a difference in
the last bit can move an activation across the middle between two integers (comparison.py).
"""

import numpy as np
import pytest

from tests.distributed.rank_models import FAMILIES, KINDS, UNIT_TOLERANCE, answers_of, check, made
from tests.quantization.comparison import without_ties
from tests.reference.torch_reference import LOGPROB_TOLERANCE

# Four ranks hold two KV heads twice; 211 tokens of the vocabulary divide by neither size.
QUICK = [("qwen2", "float32", 2), ("deepseek_v3", "w8a8 dynamic", 2)]
CASES = [
    pytest.param(*case, id="-".join(map(str, case)), marks=() if case in QUICK else pytest.mark.slow)
    for case in ((family, kind, size) for family in FAMILIES for kind in KINDS for size in (2, 4))
]


@pytest.mark.feature("tensor parallelism")
@pytest.mark.parametrize(("family", "kind", "size"), CASES)
def test_tokens_and_logprobs(family: str, kind: str, size: int) -> None:
    model = made(family, kind, size)
    prompts, answers = without_ties(model.model, model.margin)
    check(*answers_of(model.folder, prompts, tensor_parallel_size=size), answers, model.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["float32", "w8a8 static"])
def test_as_one_process(family: str, kind: str) -> None:
    """Two and four ranks answer as one does."""
    model = made(family, kind, 1)
    prompts, _ = without_ties(model.model, model.margin)
    tokens, found = answers_of(model.folder, prompts)
    for size in (2, 4):
        others, logprobs = answers_of(model.folder, prompts, tensor_parallel_size=size)
        assert others == tokens
        off = np.concatenate([np.abs(a - b).reshape(-1) for a, b in zip(found, logprobs, strict=True)])
        assert off.max() < (1e-3 if kind == "float32" else UNIT_TOLERANCE)
        assert np.median(off) < LOGPROB_TOLERANCE
