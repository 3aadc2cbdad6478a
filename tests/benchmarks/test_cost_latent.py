"""DeepSeek's bytes and operations against counts that know nothing of the formulas."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost_latent import LatentShape
from benchmarks.models import CONFIGS
from tests.benchmarks.test_cost import model_of

CONFIG = CONFIGS["deepseek-v3-2b"]
SMALL = CONFIG | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
}


def test_weights_are_those_of_transformers():
    model = model_of(CONFIG, "meta")
    biases = [bias.numel() for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")]
    stored = 2 * sum(weight.numel() for weight in model.parameters()) + 4 * sum(biases)
    assert LatentShape.of(CONFIG).weight_bytes == stored


def test_a_token_reads_its_own_experts():
    shape = LatentShape.of(CONFIG)
    expert = 3 * 2 * CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"]
    idle = shape.moe_layers * (256 - 8) * expert + 2 * (shape.head - CONFIG["hidden_size"])  # one row is embedded
    assert shape.decode_step([1]).bytes == pytest.approx(shape.weight_bytes - idle)


def test_prefill_multiplies_as_often_as_transformers():
    """Its eager attention computes all pairs of positions, of which causal attention needs half."""
    shape, model, prompt = LatentShape.of(SMALL), model_of(SMALL, "cpu"), 24
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, prompt, dtype=torch.long), logits_to_keep=1, use_cache=False)
    pair = SMALL["qk_nope_head_dim"] + SMALL["qk_rope_head_dim"] + SMALL["v_head_dim"]
    saved = 2 * pair * 4 * SMALL["num_hidden_layers"] * (prompt**2 - prompt * (prompt + 1) / 2)
    assert counter.get_total_flops() == pytest.approx(shape.prefill(prompt).flops + saved)


def test_w8a8_halves_what_is_quantized():
    floats, quantized = LatentShape.of(CONFIG), LatentShape.of(CONFIG, "w8a8")
    matrices = [*floats.dense, *floats.expert * floats.moe_layers * 256]
    saved = sum(rows * columns for rows, columns in matrices)
    scales = 4 * sum(rows for rows, _ in matrices)
    assert floats.weight_bytes - quantized.weight_bytes == pytest.approx(saved - scales)
    step = quantized.decode_step([1])
    assert step.int8_ops + step.flops == floats.decode_step([1]).flops


def test_the_cache_holds_latents():
    shape = LatentShape.of(CONFIG)
    more = shape.decode_step([129] * 8).bytes - shape.decode_step([1] * 8).bytes
    assert more == 8 * 128 * 2 * 4 * (512 + 64) == 8 * 128 * shape.kv_bytes_per_token
