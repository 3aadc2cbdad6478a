"""Two ranks of a model as compiled graphs, with MindSpore's collectives within them, against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ascend.graph_runs import check
from tests.checkpoints import DEEPSEEK, checkpoint
from tests.distributed.device_ranks import run_ranks

EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What the ranks share, architecture, config.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("tensor", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "olmo2": ("tensor", "Olmo2ForCausalLM", {}),
    "qwen3_moe": ("tensor", "Qwen3MoeForCausalLM", EXPERTS),
    "qwen3_moe, data": ("data", "Qwen3MoeForCausalLM", EXPERTS),
    "deepseek_v3, data": ("data", "DeepseekV3ForCausalLM", DEEPSEEK),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_two_ranks(name: str, tmp_path: Path) -> None:
    """Of five experts the first rank has two. Data-parallel ranks have a prompt each."""
    shared, architecture, options = MODELS[name]
    folder = checkpoint(name.split(",")[0], **options)
    arguments = shared, architecture, str(folder), str(tmp_path)
    run_ranks("tests.distributed.graph_rank", *arguments, done="done", seconds=300)
    for rank in range(2):
        prompts = slice(rank, rank + 1) if shared == "data" else slice(None)
        with np.load(tmp_path / f"{rank}.npz") as found:
            check(found.values(), folder, prompts)
