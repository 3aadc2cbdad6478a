"""Whole models in vLLM's engine on the Ascend back end's calls, of operators that do what they document.

Nothing here runs on the hardware.
"""

from typing import Any

import pytest
import torch

from tests.ascend.whole_models import check, logprobs
from tests.checkpoints import DEEPSEEK, checkpoint
from tests.quantization import writers_others
from tests.quantization.models import written

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32, "num_key_value_heads": 2},
    "qwen3": {"head_dim": 32, "num_key_value_heads": 2},
    "deepseek_v3": DEEPSEEK | {"qk_rope_head_dim": 32},
    "qwen3_moe": {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
QUICK = ("deepseek_v3",)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_model_is_as_near_to_float32_as_the_reference(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(family, dtype=torch.bfloat16, **FAMILIES[family])
    called = check(family, lambda dtype, env: logprobs(folder, dtype, env), monkeypatch)
    assert {
        "reshape_and_cache",
        "paged_attention",
        "apply_rotary_pos_emb",
        "add_rms_norm",
        "swiglu",
        "gather",
    } <= called
    assert ("grouped_matmul" in called) == (family in ("deepseek_v3", "qwen3_moe"))
    assert ("flash_attention" in called) == (family != "deepseek_v3")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["golden stick w8a8", "modelslim w8a8"])
def test_static_inputs_in_16_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden Stick's have a scale for each input."""
    folder = written("llama", writers_others.SCHEMES[name], **FAMILIES["llama"]).folder
    called = check(name, lambda dtype, env: logprobs(folder, dtype, env), monkeypatch)
    assert {"quantize", "quant_matmul"} <= called
