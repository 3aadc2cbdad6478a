"""Qwen2 and Qwen2.5: biases on q, k and v; windows in some layers."""

from transformers import Qwen2Config

from tests.zoo.family import Family

FAMILY = Family(
    ("Qwen2ForCausalLM",),
    Qwen2Config,
    {
        "grouped heads": {},
        "tied, one KV head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
        "windows in some layers": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    },
)
