"""Gated activations, by their name in config.json."""

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def gated_activation(name: str) -> str:
    """What `Kernels.linear_gated` calls config.json's `hidden_act`; ValueError for one that is not implemented."""
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    *most, last = _ACTIVATIONS
    raise ValueError(
        f"Activation {name!r} (hidden_act in config.json) is not supported; supported are {', '.join(most)} and {last}."
    )
