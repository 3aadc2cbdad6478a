"""MiniCPM: Granite's arithmetic by other numbers, and a config that transformers does not have."""

from pathlib import Path

from transformers import GraniteConfig

from tests.zoo.family import Family
from tests.zoo.publishing import source_config, tensors_of, write

LAYERS = 3
DEPTH = 1.4


def factors(head_size: int, width: float, layers: int = LAYERS) -> dict[str, object]:
    """As Granite has them; `width` is hidden size / dim_model_base."""
    return {
        "embedding_multiplier": 12.0,
        "residual_multiplier": DEPTH / layers**0.5,
        "attention_multiplier": head_size**-0.5,
        "logits_scaling": width,
        "num_hidden_layers": layers,
        "initializer_range": 0.3,
    }


def publish(source: Path, target: Path) -> None:
    config = source_config(source)
    entries = {
        "scale_emb": config["embedding_multiplier"],
        "scale_depth": DEPTH,
        "dim_model_base": config["hidden_size"] / config["logits_scaling"],
    }
    write(target, tensors_of(source), "MiniCPMForCausalLM", "minicpm", entries)


FAMILY = Family(
    ("MiniCPMForCausalLM",),
    GraniteConfig,
    {
        "tied": factors(16, 4.0) | {"hidden_size": 64, "tie_word_embeddings": True},
        "untied, one KV head": factors(16, 2.0) | {"num_key_value_heads": 1},
        "biases, more layers": factors(16, 4.0, 6) | {"attention_bias": True},
    },
    publish,
    in_16_bits=factors(32, 4.0, 4),
    alike=True,
)
