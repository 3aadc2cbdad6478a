"""Granite: factors on the embedding, attention scores, residual sums and logits."""

from transformers import GraniteConfig

from tests.zoo.family import Family

FACTORS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.5,
    "initializer_range": 0.4,  # logits are divided: this keeps them apart
}

FAMILY = Family(
    ("GraniteForCausalLM",),
    GraniteConfig,
    {
        "all factors": FACTORS,
        "tied, biases": FACTORS | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        "large residuals, large eps": FACTORS | {"residual_multiplier": 2.5, "rms_norm_eps": 1e-2},
    },
)
