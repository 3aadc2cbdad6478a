"""gpt-oss: sinks, windows in every second layer, experts with biases and a clamped gate, YaRN."""

from typing import Any

from transformers import GptOssConfig

from tests.zoo.family import Family

YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
SMALL: dict[str, Any] = {
    "head_dim": 16,
    "intermediate_size": 64,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
    "rope_parameters": YARN,
}

FAMILY = Family(
    ("GptOssForCausalLM",),
    GptOssConfig,
    {
        "sinks and windows": SMALL,
        "one KV head, all experts": SMALL | {"num_key_value_heads": 1, "num_experts_per_tok": 6, "head_dim": 32},
        "windows in other layers, no attention bias, tied": SMALL
        | {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    },
    in_16_bits={"num_experts_per_tok": 6},  # all: where rounding changes which, either side is off by chance
)
