"""Gemma 2: capped scores and logits, windows in every second layer, four norms a layer."""

from typing import Any

from transformers import Gemma2Config

from tests.zoo.family import Family


def config(**options: Any) -> Gemma2Config:
    """torch's own attention, transformers' default, leaves the cap out."""
    return Gemma2Config(attn_implementation="eager", **options)


FAMILY = Family(
    ("Gemma2ForCausalLM",),
    config,
    {
        "caps and windows": {
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 20.0,
        },
        "no caps, wide heads": {
            "head_dim": 32,
            "sliding_window": 33,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        "one KV head, windows in other layers, biases": {
            "head_dim": 16,
            "num_key_value_heads": 1,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
            "attention_bias": True,
            "final_logit_softcapping": 4.0,
        },
    },
)
