"""OPT: learned positions, norms before or after the blocks, embeddings narrower than the hidden states."""

from typing import Any

from transformers import OPTConfig

from tests.zoo.family import Family


def config(intermediate_size: int, num_key_value_heads: int, **options: Any) -> OPTConfig:
    """The feed-forward block's size is called otherwise, and every head has its own keys."""
    del num_key_value_heads
    return OPTConfig(ffn_dim=intermediate_size, **options)


FAMILY = Family(
    ("OPTForCausalLM",),
    config,
    {
        "norms before": {},
        "norms after, narrow embeddings": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
        "no biases, no last norm": {"enable_bias": False, "_remove_final_layer_norm": True},
        "norms without weights, gelu, own head": {
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    },
)
