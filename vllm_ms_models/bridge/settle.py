"""Putting on a device, once all is loaded, what its kernels would else put there at the first step.

So the size of the KV cache counts it.
"""

from typing import Any

from vllm_ms_models import kernels
from vllm_ms_models.bridge.tensors import DTYPES
from vllm_ms_models.kernels import Weight
from vllm_ms_models.layers.moe import MoE


def settle(model: Any) -> None:
    """The weights of a model, one of bridge/model.py."""
    active, dtype = kernels.get().beside_graphs, DTYPES[model.dtype]
    compiled: set[int] = set()
    if kernels.get().compiled:
        model.run.start()
        compiled = {id(part) for _, part in model.run.cell.cells_and_names()}
    for _, part in model.cell.cells_and_names():
        if id(part) in compiled:
            continue
        if getattr(getattr(part, "kernels", None), "compiled", False):
            raise TypeError(f"{type(part).__name__} is not part of the decoder; make it within `making_encoders()`.")
        weight = getattr(getattr(part, "scheme", None), "weight", None)
        if isinstance(weight, Weight):
            active.settle(weight, dtype)
        if isinstance(part, MoE):
            gate_up_bias, down_bias = part.biases
            active.settle_experts(part.gate_up, part.down, (gate_up_bias is not None, down_bias is not None), dtype)
