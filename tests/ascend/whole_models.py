"""How far a whole model on the Ascend back end's calls is from the model in float32, beside the reference kernels.

In bfloat16 the Ascend back end rounds more often: it may be twice as far from float32 as the reference kernels are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.ascend.standin import StandIn
from tests.checkpoints import random_prompts
from tests.engines import engine
from vllm_ms_models import kernels
from vllm_ms_models.kernels.ascend import AscendKernels

TOKENS = 4
# Of each prompt: what was generated, and rows of numbers that are compared up to where that begins to differ.
Answers = list[tuple[list[int], np.ndarray]]


LENGTHS = (1, 7, 90, 33, 16)


def logprobs(folder: Any, dtype: str, env: dict[str, str], lengths: Sequence[int] = LENGTHS, **options: Any) -> Answers:
    """Of each prompt: the tokens generated, and the logarithms of all probabilities at each."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(lengths)]
    # Prompts longer than a step's budget go in parts, which meet the first ones' decoding.
    options = {"max_num_batched_tokens": 48, "async_scheduling": False} | options
    with engine(folder, env, dtype=dtype, **options) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=-1))
    found = []
    for output in outputs:
        rows = [[row[token].logprob for token in sorted(row)] for row in output.outputs[0].logprobs]
        found.append((list(output.outputs[0].token_ids), np.array(rows)))
    return found


def check(name: str, answers: Callable[[str, dict[str, str]], Answers], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Compare what `answers(dtype, env)` gives on each back end; the names of the operators that were called."""
    exact = answers("float32", {"VLLM_MS_KERNELS": "reference"})
    rounded = answers("bfloat16", {"VLLM_MS_KERNELS": "reference"})
    standin = StandIn()
    monkeypatch.setattr(kernels, "choose", lambda device: AscendKernels(standin))
    ascend = answers("bfloat16", {})
    assert isinstance(kernels.get(), AscendKernels)
    errors = [_error(exact, other) for other in (rounded, ascend)]
    print(f"\nAscend, {name}: off by {errors[1]:.2g} from float32 (rms); the reference by {errors[0]:.2g}")
    assert errors[1] <= 2 * errors[0]
    return set(standin.called)


def _error(exact: Answers, other: Answers) -> float:
    """Root of the mean square."""
    differences = []
    for (want, rows), (got, others) in zip(exact, other, strict=True):
        same = next((i for i, pair in enumerate(zip(want, got, strict=True)) if pair[0] != pair[1]), len(rows) - 1)
        differences.append((others - rows)[: same + 1].ravel())  # afterwards the sequences differ
    return float(np.sqrt(np.mean(np.concatenate(differences) ** 2)))
