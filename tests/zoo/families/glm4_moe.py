"""GLM-4.5 and 4.6: experts chosen as DeepSeek-V3's are, with heads as Llama's."""

from transformers import Glm4MoeConfig

from tests.zoo.family import Family

EXPERTS = {
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
    "routed_scaling_factor": 1.5,
}

FAMILY = Family(
    ("Glm4MoeForCausalLM",),
    Glm4MoeConfig,
    {
        "norms of queries and keys": EXPERTS | {"use_qk_norm": True},
        "biases, all layers with experts": EXPERTS | {"attention_bias": True, "first_k_dense_replace": 0},
        "groups, shares as they are": EXPERTS | {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    },
    in_16_bits={"head_dim": 32, "num_experts_per_tok": 8},  # all: rounding must not change which
    floats=(".gate",),
)
