"""Two ranks of a model as compiled graphs, with MindSpore's collectives within them, against transformers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import checkpoint
from tests.distributed.graph_rank import PROMPTS, STEPS
from tests.distributed.test_device_group import ROLES
from tests.reference.torch_reference import LOGPROB_TOLERANCE, load, logits
from tests.servers import free_port

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
    common = {"MS_WORKER_NUM": "2", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.distributed.graph_rank", architecture, str(folder), str(tmp_path / "0.npz")]
    processes = [
        subprocess.Popen(
            command, env=os.environ | common | role, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for role in ROLES
    ]
    try:
        for process in processes[1:]:
            output, _ = process.communicate(timeout=300)
            assert "done" in output, output[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    model = load(folder)
    with np.load(tmp_path / "0.npz") as found:
        for prompt, counts, rows in zip(PROMPTS, zip(*STEPS, strict=True), found.values(), strict=True):
            want = logits(model, prompt[: sum(counts)]).numpy()
            assert np.abs(rows - want).max() < LOGPROB_TOLERANCE
