"""Mistral: one window in all layers, or none."""

from transformers import MistralConfig

from tests.zoo.family import Family

FAMILY = Family(
    ("MistralForCausalLM",),
    MistralConfig,
    {
        "window": {"sliding_window": 24},
        "no window": {"sliding_window": None},
        "wide heads": {"head_dim": 32, "sliding_window": 33},
    },
)
