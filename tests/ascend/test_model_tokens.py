"""Whole models in vLLM's engine on the Ascend back end's calls give the CPU back end's tokens.

Nothing here runs on the hardware: the operators compute what they document, in float32, which they do not take there.
So nothing is rounded between them, and random models' tokens can be held against those of the C++ kernels. (In
bfloat16, test_models.py compares the distances to float32.)
"""

from pathlib import Path
from typing import Any

import pytest

from tests.ascend.comparing import in_float32
from tests.ascend.standin import StandIn
from tests.checkpoints import DEEPSEEK, checkpoint, random_prompts
from tests.engines import engine, greedy, token_ids
from tests.lora.test_lora_parity import compare
from tests.quantization.test_quantized_experts import made
from tests.zoo.family import families
from vllm_ms_models import kernels
from vllm_ms_models.kernels.ascend import AscendKernels

TOKENS = 24
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 128},  # the operators take heads of multiples of 16
    "llama": {"head_dim": 32},
    "deepseek_v3": DEEPSEEK
    | {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "qk_rope_head_dim": 32},
    "qwen3_moe": {
        "hidden_size": 64,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gpt_oss": {**families()["gpt_oss"].cases["sinks and windows"], "head_dim": 32},
}
PRODUCTS = {
    "floats": "matmul",
    "w8a8 dynamic": "quant_matmul",
    "w8a8 static": "quant_matmul",
    "packed w4a16": "weight_quant_matmul",
}
CASES = [
    *((family, "floats") for family in ("qwen2", "llama", "deepseek_v3", "qwen3_moe")),
    *((family, name) for family in ("qwen2", "llama", "deepseek_v3") for name in ("w8a8 dynamic", "w8a8 static")),
    ("llama", "packed w4a16"),
    ("qwen3_moe", "packed w4a16"),
    ("deepseek_v3", "packed w4a16"),
    ("gpt_oss", "floats"),  # sinks, biases of experts, clamped_swiglu
]
QUICK = [("deepseek_v3", "w8a8 dynamic")]


def folder_of(family: str, name: str) -> Path:
    if name == "floats":
        return checkpoint(family, **FAMILIES[family])
    model, _ = made(family, name, **FAMILIES[family])
    return model.folder


def answers(folder: Path) -> list[list[int]]:
    # Prompts longer than a step's budget go in parts, which meet the first ones' decoding.
    with engine(folder, max_num_batched_tokens=48, async_scheduling=False) as llm:
        return token_ids(greedy(llm, random_prompts([1, 7, 90, 33, 16]), TOKENS))


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_tokens_are_those_of_the_cpu(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(family, name)
    want = answers(folder)
    in_float32(monkeypatch)
    standin = StandIn()
    monkeypatch.setattr(kernels, "choose", lambda device: AscendKernels(standin))
    got = answers(folder)
    assert isinstance(kernels.get(), AscendKernels)
    assert got == want
    attention = "batch_matmul" if family == "gpt_oss" else "paged_attention"
    assert {PRODUCTS[name], attention, "reshape_and_cache", "apply_rotary_pos_emb"} <= set(standin.called)
    if family in ("deepseek_v3", "qwen3_moe", "gpt_oss"):
        one_by_one = (family, name) == ("deepseek_v3", "packed w4a16")  # its 80 inputs are two groups of 32 and a half
        chosen = "sigmoid_group_top_k" if family == "deepseek_v3" else "softmax_top_k"
        assert chosen in standin.called and (f"grouped_{PRODUCTS[name]}" in standin.called) != one_by_one


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_adapters_are_those_of_peft(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_float32(monkeypatch)
    standin = StandIn()
    monkeypatch.setattr(kernels, "choose", lambda device: AscendKernels(standin))
    compare(family, max_num_batched_tokens=24)
    assert isinstance(kernels.get(), AscendKernels) and "paged_attention" in standin.called


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_packed_weights_are_on_the_device_before_its_free_memory_is_asked_for(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else the KV cache would be as much too large."""
    folder = folder_of(family, "packed w4a16")
    in_float32(monkeypatch)
    standin = StandIn()
    known: list[int] = []

    def packed() -> int:
        return sum("Int4" in str(upload) for upload in standin.uploads)

    def memory() -> tuple[int, int]:
        known.append(packed())
        return 2 << 30, 1 << 30

    monkeypatch.setattr(standin, "memory", memory)
    monkeypatch.setattr(kernels, "choose", lambda device: AscendKernels(standin))
    answers(folder)
    linears = {"llama": 4, "qwen3_moe": 2 + 2}  # of qwen3_moe: experts in two stacks
    assert set(known) == {2 * linears[family]} and packed() == known[0]  # of two layers
