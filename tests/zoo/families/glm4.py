"""GLM-4-0414: norms on both sides of a block, pairs of neighbours rotated in a part of each head."""

from transformers import Glm4Config

from tests.zoo.family import Family

FAMILY = Family(
    ("Glm4ForCausalLM",),
    Glm4Config,
    {
        "biases": {"head_dim": 16},
        "no biases, wide heads": {"head_dim": 32, "attention_bias": False},
        "three quarters rotated, tied": {
            "head_dim": 16, "num_key_value_heads": 1, "partial_rotary_factor": 0.75, "tie_word_embeddings": True
        },
    },
    in_16_bits={"head_dim": 32},
)  # fmt: skip
