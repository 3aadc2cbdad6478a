"""OLMo 3: OLMo 2 with windows in most layers, whose positions are scaled otherwise."""

from transformers import Olmo3Config

from tests.zoo.family import Family

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

FAMILY = Family(
    ("Olmo3ForCausalLM",),
    Olmo3Config,
    {
        "windows in two of three layers": {
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
        },
        "YaRN where all is seen": {
            "sliding_window": 24,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        "windows only": {"sliding_window": 33, "num_key_value_heads": 1},
    },
    alike=True,
    in_16_bits={
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
    },
)
