"""Activations, by their name in config.json."""

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

CLAMPED_SWIGLU = "clamped_swiglu"
"""gpt-oss's, which no `hidden_act` names."""

# What only blocks without a gate have.
_PLAIN = _ACTIVATIONS | {"gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu"}


def gated_activation(name: str) -> str:
    """What `Kernels.linear_gated` calls config.json's `hidden_act`; ValueError for one that is not implemented."""
    return name if name == CLAMPED_SWIGLU else _find(name, _ACTIVATIONS)


def plain_activation(name: str) -> str:
    """What `Kernels.activate` calls config.json's `hidden_act`; ValueError for one that is not implemented."""
    return _find(name, _PLAIN)


def _find(name: str, known: dict[str, str]) -> str:
    if name in known:
        return known[name]
    *most, last = known
    raise ValueError(
        f"Activation {name!r} (hidden_act in config.json) is not supported; supported are {', '.join(most)} and {last}."
    )
