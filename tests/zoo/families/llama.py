"""Llama: biases and kinds of rope as the config says."""

from transformers import LlamaConfig

from tests.zoo.family import Family

FAMILY = Family(
    ("LlamaForCausalLM",),
    LlamaConfig,
    {
        "grouped heads": {},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "wide heads, tied": {"head_dim": 32, "tie_word_embeddings": True},
    },
)
