"""Models split over processes by vLLM's own multiprocess executor, against torch models and against one process.

Ranks add their sums of products in another order than one process does, so that the bounds are those of any two
float32 implementations (torch_reference.py). W8A8 with activations of a fixed scale multiplies the same integers,
however they are split; rounded by token, each rank takes the largest magnitude among its own inputs of a row-parallel
linear (as vLLM's do), a finer rounding than one process has: the torch model does the same. In both, a difference in
the last bit can move an activation across the middle between two integers (test_quantized_models.py).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import checkpoint
from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization import test_quantized_experts as quantized_models
from tests.quantization.models import SIZES, Exact, replace_module
from tests.quantization.test_quantized_models import TOKENS, UNIT_TOLERANCE, VOCABULARY, differences, without_ties
from tests.quantization.writers import Multiply
from tests.reference import torch_reference
from tests.reference.torch_reference import LOGPROB_TOLERANCE, Answer

SUMMED = ("o_proj", "down_proj")  # whose inputs are split
FAMILIES = ("qwen2", "llama", "qwen3_moe", "deepseek_v3")
KINDS = ("float32", "w8a8 static", "w8a8 dynamic")
# Four ranks hold two KV heads twice; 211 tokens of the vocabulary divide by neither size.
QUICK = [("qwen2", "float32", 2), ("deepseek_v3", "w8a8 dynamic", 2)]
CASES = [
    pytest.param(*case, id="-".join(map(str, case)), marks=() if case in QUICK else pytest.mark.slow)
    for case in ((family, kind, size) for family in FAMILIES for kind in KINDS for size in (2, 4))
]


@dataclass(frozen=True)
class Model:
    """A checkpoint, the torch model that it stands for, and by how much any log-probability may differ."""

    folder: Path
    model: torch.nn.Module
    tolerance: float


def in_parts(multiply: Multiply, size: int, x: np.ndarray) -> np.ndarray:
    """The sum of what `size` ranks get of their part of the inputs; zeros round to zero and change no maximum."""
    parts = np.array_split(np.arange(x.shape[1]), size)
    return np.sum([multiply(np.where(np.isin(np.arange(x.shape[1]), part), x, 0)) for part in parts], 0)


def made(family: str, kind: str, size: int) -> Model:
    if kind == "float32":
        folder = checkpoint(family, 0, **SIZES, **quantized_models.FAMILIES.get(family, {}))
        return Model(folder, torch_reference.load(folder), LOGPROB_TOLERANCE)
    quantized, _ = quantized_models.made(family, kind)
    if kind == "w8a8 dynamic":
        for name, linear in quantized.linears.items():
            if name.endswith(SUMMED):
                multiply = functools.partial(in_parts, linear.multiply, size)
                replace_module(quantized.model, name, Exact(multiply))
    return Model(quantized.folder, quantized.model, UNIT_TOLERANCE)


def answers_of(folder: Path, prompts: Sequence[Sequence[int]], size: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """Tokens, and the log-probabilities within each prompt."""
    with engine(folder, max_model_len=64, tensor_parallel_size=size) as llm:
        outputs = greedy(llm, prompts, TOKENS, prompt_logprobs=-1)
        return token_ids(outputs), [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]


def check(tokens: list[list[int]], found: Sequence[np.ndarray], answers: Sequence[Answer], tolerance: float) -> None:
    off = differences(found, answers)
    assert off.max() < tolerance
    assert np.median(off) < LOGPROB_TOLERANCE
    assert tokens == [answer.tokens for answer in answers]


@pytest.mark.parametrize(("family", "kind", "size"), CASES)
def test_tokens_and_logprobs(family: str, kind: str, size: int) -> None:
    model = made(family, kind, size)
    prompts, answers = without_ties(model.model, 2 * model.tolerance)
    check(*answers_of(model.folder, prompts, size), answers, model.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["float32", "w8a8 static"])
def test_as_one_process(family: str, kind: str) -> None:
    """Two and four ranks answer as one does."""
    model = made(family, kind, 1)
    prompts, _ = without_ties(model.model, 2 * model.tolerance)
    tokens, found = answers_of(model.folder, prompts, 1)
    for size in (2, 4):
        others, logprobs = answers_of(model.folder, prompts, size)
        assert others == tokens
        off = np.concatenate([np.abs(a - b).reshape(-1) for a, b in zip(found, logprobs, strict=True)])
        assert off.max() < (1e-3 if kind == "float32" else UNIT_TOLERANCE)
        assert np.median(off) < LOGPROB_TOLERANCE
