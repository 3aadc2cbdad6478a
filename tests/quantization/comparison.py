"""When a quantized model's answers are those of its torch model.

With activations rounded to int8, a difference in the last bit of a float now and then moves an activation across the
middle between two integers. That is one unit of one input, and no fault: `UNIT_TOLERANCE` allows for a few of them, and
the median of all differences, which they do not reach, must be as small as without.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from tests.checkpoints import random_prompts
from tests.reference import torch_reference
from tests.reference.torch_reference import Answer

TOKENS = 10
LENGTHS = (1, 33, 20)
VOCABULARY = 211
UNIT_TOLERANCE = 0.05


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
