"""Phi-3, 3.5 and Phi-4: fused projections, a part of each head rotated, factors for each pair (longrope)."""

from transformers import Phi3Config

from tests.zoo.family import Family

SHORT = [1.0, 1.02, 1.05, 1.1, 1.3, 1.7]


def longrope(short: list[float]) -> dict[str, object]:
    """Of three quarters of each head, the short factors of which are used for `original` positions."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    factors = {"short_factor": short, "long_factor": [4 * factor for factor in short]}
    return {"original_max_position_embeddings": 256, "rope_parameters": rope | factors}


FAMILY = Family(
    ("Phi3ForCausalLM",),
    Phi3Config,
    {
        "longrope": longrope(SHORT) | {"hidden_size": 64},
        "window": {"sliding_window": 24},
        "tied, one KV head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    },
    in_16_bits=longrope([factor for factor in SHORT for _ in range(2)]),
)
