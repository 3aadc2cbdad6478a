"""Gemma 3: norms of queries and keys, other angles in layers with a window."""

from transformers import Gemma3TextConfig

from tests.zoo.family import Family

SMALL = {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 24}

FAMILY = Family(
    ("Gemma3ForCausalLM",),
    Gemma3TextConfig,
    {
        "two windows to one layer without": SMALL | {"sliding_window_pattern": 3},
        "scaled global angles": SMALL
        | {
            "num_hidden_layers": 4,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "one KV head, capped logits, biases": SMALL
        | {
            "num_key_value_heads": 1,
            "head_dim": 32,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 4.0,
            "attention_bias": True,
        },
        "entries of older configs": SMALL
        | {
            "sliding_window_pattern": 2,
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    },
)
