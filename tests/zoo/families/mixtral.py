"""Mixtral: experts in every layer."""

from transformers import MixtralConfig

from tests.zoo.family import Family

FAMILY = Family(
    ("MixtralForCausalLM",),
    MixtralConfig,
    {
        "two of four": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "window": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
        "one expert a token": {"num_local_experts": 3, "num_experts_per_tok": 1, "num_key_value_heads": 4},
    },
    in_16_bits={"num_experts_per_tok": 4},  # all: where rounding changes which, either side is off by chance
    floats=(".gate",),
)
