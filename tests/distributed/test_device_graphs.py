"""Two ranks of a model as compiled graphs, with MindSpore's collectives within them, against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ascend.graph_runs import check
from tests.checkpoints import checkpoint
from tests.distributed.device_ranks import run_ranks

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_logits_of_two_ranks(family: str, tmp_path: Path) -> None:
    """The first rank has two of the five experts."""
    architecture, options = MODELS[family]
    folder = checkpoint(family, **options)
    target = tmp_path / "0.npz"
    run_ranks("tests.distributed.graph_rank", architecture, str(folder), str(target), done="done", seconds=300)
    with np.load(target) as found:
        check(found.values(), folder)
