"""Qwen3-MoE: experts in all layers or some."""

from transformers import Qwen3MoeConfig

from tests.zoo.family import Family

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILY = Family(
    ("Qwen3MoeForCausalLM",),
    Qwen3MoeConfig,
    {
        "experts in all layers": EXPERTS,
        "one dense layer": EXPERTS | {"mlp_only_layers": [1], "norm_topk_prob": True},
        "experts in every second layer": EXPERTS | {"decoder_sparse_step": 2, "head_dim": 32},
    },
    in_16_bits={"num_experts_per_tok": 6},  # all: where rounding changes which, either side is off by chance
    floats=(".gate",),
)
