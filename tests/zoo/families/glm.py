"""GLM-4: pairs of neighbours rotated in a part of each head, norms before the blocks only."""

from transformers import GlmConfig

from tests.zoo.family import Family

FAMILY = Family(
    ("GlmForCausalLM",),
    GlmConfig,
    {
        "biases": {"head_dim": 16, "attention_bias": True},
        "no biases, wide heads": {"head_dim": 32, "attention_bias": False},
        "all rotated, tied": {"head_dim": 16, "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
    },
    in_16_bits={"head_dim": 32},
    alike=True,
)
