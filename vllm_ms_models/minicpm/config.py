"""MiniCPM's config, which transformers has only as code in each checkpoint: that code never runs here."""

from typing import Any

from transformers import LlamaConfig


class MiniCPMConfig(LlamaConfig):
    """Llama's, the factors, and what is refused."""

    model_type = "minicpm"

    tie_word_embeddings: bool = True
    scale_emb: float | int = 1
    scale_depth: float | int = 1
    dim_model_base: int = 1
    num_experts: int = 0
    sparse_config: dict[str, Any] | None = None


def check(config: Any) -> None:
    """ValueError, naming the entry of config.json, for what is not implemented."""
    if config.num_experts:
        raise ValueError(f"num_experts={config.num_experts} in config.json (MiniCPM-MoE) is not supported.")
    if config.sparse_config:
        raise ValueError(
            "sparse_config in config.json (attention to chosen blocks) is not supported; without it the model attends "
            "to all positions: remove it."
        )
