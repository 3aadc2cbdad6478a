"""What tests of several processes share: models on disk, the torch models they stand for, and the comparison.

W8A8 rounds by token differently on several tensor-parallel ranks (test_tensor_parallel.py): the torch model does too.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import checkpoint
from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization import comparison
from tests.quantization import test_quantized_experts as quantized_models
from tests.quantization.comparison import TOKENS, VOCABULARY, differences
from tests.quantization.models import SIZES, Exact, replace_module
from tests.quantization.writers import Multiply
from tests.reference import torch_reference
from tests.reference.torch_reference import LOGPROB_TOLERANCE, Answer

SUMMED = ("o_proj", "down_proj")  # whose inputs are split
FAMILIES = ("qwen2", "llama", "qwen3_moe", "deepseek_v3")
# Ranks add in another order, so that more activations than in one process fall to the other side of the middle between
# two integers (comparison.py). One such unit was seen to move log-probabilities of these models by up to 0.13.
UNIT_TOLERANCE = 0.15
KINDS = ("float32", "w8a8 static", "w8a8 dynamic")


@dataclass(frozen=True)
class Model:
    """A checkpoint, the torch model that it stands for, and by how much any log-probability may differ."""

    folder: Path
    model: torch.nn.Module
    tolerance: float

    @property
    def margin(self) -> float:
        """By how much each token is to be chosen at least: beyond rounding, but for what few positions see."""
        return 2 * min(self.tolerance, comparison.UNIT_TOLERANCE)


def in_parts(multiply: Multiply, size: int, x: np.ndarray) -> np.ndarray:
    """The sum of what `size` ranks get of their part of the inputs; zeros round to zero and change no maximum."""
    parts = np.array_split(np.arange(x.shape[1]), size)
    return np.sum([multiply(np.where(np.isin(np.arange(x.shape[1]), part), x, 0)) for part in parts], 0)


def made(family: str, kind: str, size: int, sharing: int | None = None, **options: Any) -> Model:
    """A model of `family` for `size` tensor-parallel ranks; `options` are those of its config.

    `sharing` is among how many ranks each expert is split, `size` unless it is given.
    """
    if kind == "float32":
        folder = checkpoint(family, 0, **(SIZES | quantized_models.FAMILIES.get(family, {}) | options))
        return Model(folder, torch_reference.load(folder), LOGPROB_TOLERANCE)
    quantized, _ = quantized_models.made(family, kind, **options)
    if kind == "w8a8 dynamic":
        for name, linear in quantized.linears.items():
            if name.endswith(SUMMED):
                parts = sharing if sharing and ".experts." in name else size
                multiply = functools.partial(in_parts, linear.multiply, parts)
                replace_module(quantized.model, name, Exact(multiply))
    return Model(quantized.folder, quantized.model, UNIT_TOLERANCE)


def answers_of(
    folder: Path, prompts: Sequence[Sequence[int]], **options: Any
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Tokens, and the log-probabilities within each prompt; `options` are those of `LLM`."""
    with engine(folder, max_model_len=64, **options) as llm:
        outputs = greedy(llm, prompts, TOKENS, prompt_logprobs=-1)
        return token_ids(outputs), [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]


def check(tokens: list[list[int]], found: Sequence[np.ndarray], answers: Sequence[Answer], tolerance: float) -> None:
    off = differences(found, answers)
    assert off.max() < tolerance
    assert np.median(off) < LOGPROB_TOLERANCE
    assert tokens == [answer.tokens for answer in answers]
