"""Gemma: scaled embeddings, norms with weights beside 1, heads wider than the hidden size's share."""

from transformers import GemmaConfig

from tests.zoo.family import Family

FAMILY = Family(
    ("GemmaForCausalLM",),
    GemmaConfig,
    {
        "wide heads": {"head_dim": 32},
        "one KV head, the old name of the activation": {"num_key_value_heads": 1, "head_dim": 16, "hidden_act": "gelu"},
        "biases, own head": {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False},
    },
)
