"""Qwen3: norms on the heads of q and k."""

from transformers import Qwen3Config

from tests.zoo.family import Family

FAMILY = Family(
    ("Qwen3ForCausalLM",),
    Qwen3Config,
    {
        "grouped heads": {"head_dim": 32},
        "tied, biases": {"tie_word_embeddings": True, "attention_bias": True},
        "windows in some layers": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    },
)
