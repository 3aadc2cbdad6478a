"""Stages of a pipeline as compiled graphs of stock operators, against transformers. Not run on the hardware."""

from typing import Any

import pytest

from tests.ascend.comparing import in_float32
from tests.ascend.graph_runs import check, loaded, logits_of
from tests.checkpoints import DEEPSEEK, checkpoint
from vllm_ms_models.distributed.stage import Stage

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "opt": ("OPTForCausalLM", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_logits_of_two_stages(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first takes tokens, the second what the first gives; each has kernels of its own, as in two processes."""
    in_float32(monkeypatch)
    architecture, options = MODELS[family]
    folder = checkpoint(family, **options)
    stages = [
        loaded(architecture, str(folder), "ids", pipeline=Stage(0, 2, range(1))),
        loaded(architecture, str(folder), "stream", pipeline=Stage(1, 2, range(1, 3))),
    ]
    check(logits_of(stages), folder)
