"""Layers behind a model's own that predict further tokens (MTP, arXiv:2412.19437): what they are called."""

from typing import Any


def prediction_tensors(config: Any) -> list[str]:
    """Patterns of their tensors; `num_nextn_predict_layers` says how many layers follow. Not needed to serve."""
    first = config.num_hidden_layers
    count = getattr(config, "num_nextn_predict_layers", None) or 0
    return [f"model.layers.{layer}.*" for layer in range(first, first + count)]
