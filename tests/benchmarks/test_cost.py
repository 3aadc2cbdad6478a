"""Bytes and operations of a step against counts that know nothing of the formulas."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.cost import Cost, Shape
from benchmarks.models import CONFIGS

# A small one of each kind, for counting operations.
SMALL = {
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def model_of(config, device):
    """The model; on the meta device names and shapes only."""
    values = dict(config)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values, attn_implementation="eager"),
            experts_implementation="eager",
        )


@pytest.mark.parametrize("name", [name for name in CONFIGS if "kv_lora_rank" not in CONFIGS[name]])
def test_parameters_are_those_of_transformers(name):
    shape, model = Shape.of(CONFIGS[name]), model_of(CONFIGS[name], "meta")
    parts = {part: weight.numel() for part, weight in model.named_parameters()}  # tied weights once
    assert shape.parameters == sum(parts.values())
    assert shape.weight_bytes == 2 * sum(parts.values())
    matrices = sum(weight.numel() for part, weight in model.named_parameters() if weight.ndim == 2)
    assert shape.layer_matrices == matrices - parts["model.embed_tokens.weight"] - parts.get("lm_head.weight", 0)
    assert shape.vectors == sum(parts.values()) - matrices


def test_half_a_billion_parameters_are_read_in_each_decode_step():
    step = Shape.of(CONFIGS["qwen2.5-0.5b"]).decode_step([1])
    assert step.bytes == pytest.approx(0.988e9, rel=0.001)
    assert step.flops == pytest.approx(0.988e9, rel=0.001)


def counted_flops(config, prompt):
    """Operations of matrix products in transformers' forward pass, logits of the last row only."""
    from torch.utils.flop_counter import FlopCounterMode

    model = model_of(config, "cpu")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, prompt, dtype=torch.long), logits_to_keep=1, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "llama-3.2-1b"])
def test_prefill_operations(name):
    """transformers computes the whole square of scores, of which causal attention needs the lower half."""
    config, prompt = CONFIGS[name] | SMALL, 64
    shape = Shape.of(config)
    saved_pairs = prompt * prompt - prompt * (prompt + 1) / 2
    saved = 4 * saved_pairs * shape.heads * shape.head_dim * shape.layers
    assert counted_flops(config, prompt) == pytest.approx(shape.prefill(prompt).flops + saved)


def test_decode_reads_the_cache_of_every_sequence():
    shape = Shape.of(CONFIGS["llama-3.2-1b"])
    per_token = 2 * 2 * 16 * 8 * 64  # bf16, keys and values, layers, heads, head size
    assert shape.kv_bytes_per_token == per_token
    more = shape.decode_step([129] * 8).bytes - shape.decode_step([1] * 8).bytes
    assert more == 8 * 128 * per_token


def test_decoding_a_prompt_token_by_token_takes_the_operations_of_its_prefill():
    shape, prompt = Shape.of(CONFIGS["qwen2.5-1.5b"]), 16
    steps = sum(shape.decode_step([context + 1]).flops for context in range(prompt))
    assert steps - 2 * (prompt - 1) * shape.head == pytest.approx(shape.prefill(prompt).flops)


def test_the_slower_limit_binds():
    limits = {"read_gb_s": 50.0, "bf16_gflop_s": 500.0, "f32_gflop_s": 100.0}
    assert Cost(1e9, 1e9).seconds(limits) == pytest.approx(0.02)
    assert Cost(1e9, 100e9).seconds(limits) == pytest.approx(0.2)
    assert Cost(0, 100e9).seconds(limits | {"bf16_gflop_s": 0.0}) == pytest.approx(1.0)


@pytest.mark.parametrize(("scheme", "of_weight"), [("w8a8", 1 + 4 / 128), ("w4a16", 0.5 + 2 / 128)])
def test_bytes_of_quantized_weights(scheme, of_weight):
    """All of the small model's matrices but down have 128 inputs, hence one scale each for 128 weights."""
    config = CONFIGS["qwen2.5-0.5b"] | SMALL
    floats, quantized = Shape.of(config), Shape.of(config, scheme)
    down = 2 * 128 * 384
    wide = (floats.layer_matrices - down) * of_weight + down * (of_weight if scheme == "w4a16" else 1 + 4 / 384)
    saved = 2 * floats.layer_matrices - wide
    assert floats.weight_bytes - quantized.weight_bytes == pytest.approx(saved)
    assert floats.decode_step([9]).bytes - quantized.decode_step([9]).bytes == pytest.approx(saved)


def test_integers_are_multiplied_at_their_own_peak():
    shape, floats = (Shape.of(CONFIGS["qwen2.5-0.5b"], scheme).prefill(128) for scheme in ("w8a8", None))
    assert shape.int8_ops == 2 * 128 * Shape.of(CONFIGS["qwen2.5-0.5b"]).layer_matrices
    assert shape.flops + shape.int8_ops == floats.flops
    limits = {"read_gb_s": 1e9, "bf16_gflop_s": 500.0, "int8_gop_s": 1000.0, "f32_gflop_s": 100.0}
    assert Cost(0, 100e9, 100e9).seconds(limits) == pytest.approx(0.3)


def test_a_quantized_head_is_no_longer_the_embedding():
    config = CONFIGS["qwen2.5-0.5b"]
    more = Shape.of(config, "w8a8-head").weight_bytes - Shape.of(config, "w8a8").weight_bytes
    assert more == config["vocab_size"] * (config["hidden_size"] + 4)
