"""Data and expert parallelism by vLLM's own engines, against torch models and against one process.

Each data-parallel rank answers prompts of its own; in a mixture of experts they run their steps together, with or
without work, and the experts are shared among all ranks: some for each (expert parallelism), or a part of each. The
bounds are those of tensor parallelism (test_tensor_parallel.py).
"""

from dataclasses import dataclass
from typing import Any

import pytest

from tests.distributed.rank_models import FAMILIES, KINDS, check, made
from tests.engines import distributions, greedy_on_data_parallel_ranks, token_ids
from tests.quantization.comparison import TOKENS, VOCABULARY, without_ties

MIXTURES = ("qwen3_moe", "deepseek_v3")


@dataclass(frozen=True)
class Layout:
    """Tensor-parallel ranks of each of two data-parallel ones, stages, and whether experts are whole."""

    ranks: int = 1
    stages: int = 1
    whole_experts: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {
            "tensor_parallel_size": self.ranks,
            "pipeline_parallel_size": self.stages,
            "enable_expert_parallel": self.whole_experts,
        }

    @property
    def sharing(self) -> int:
        """Among how many ranks an expert is split."""
        return 1 if self.whole_experts else 2 * self.ranks


LAYOUTS = {
    "dp2": Layout(),
    "dp2-ep": Layout(whole_experts=True),
    "dp2-tp2-ep": Layout(2, whole_experts=True),
    "dp2-pp2-ep": Layout(1, 2, whole_experts=True),
}
QUICK = [("deepseek_v3", "float32", "dp2-ep")]
CASES = [
    pytest.param(*case, id="-".join(case), marks=() if case in QUICK else pytest.mark.slow)
    for case in ((family, kind, layout) for family in FAMILIES for kind in KINDS for layout in LAYOUTS)
    if case[0] in MIXTURES or case[2] == "dp2"
]


@pytest.mark.feature("data and expert parallelism")
@pytest.mark.parametrize(("family", "kind", "layout"), CASES)
def test_tokens_and_logprobs(family: str, kind: str, layout: str) -> None:
    """Of every rank when all have work, and of each alone."""
    where = LAYOUTS[layout]
    model = made(family, kind, where.ranks, where.sharing)
    prompts, answers = without_ties(model.model, model.margin)
    found = greedy_on_data_parallel_ranks(model.folder, prompts, TOKENS, 2, max_model_len=64, **where.options)
    for rank in range(2):
        outputs = [of_ranks[rank] for of_ranks in found]
        logprobs = [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]
        check(token_ids(outputs), logprobs, [*answers, answers[0]], model.tolerance)
