"""Loaded weights as what a graph multiplies by: parameters, made once. **Not run on hardware.**"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor

from vllm_ms_models.kernels.ascend import integers
from vllm_ms_models.kernels.ascend.integers import FloatInputWeight
from vllm_ms_models.kernels.ascend.weights import Int8Weight, StaticPart, static_parts
from vllm_ms_models.kernels.weight import Weight

Keep = Callable[[Tensor], Parameter]


@dataclass(frozen=True, eq=False)
class GraphWeight(Weight):
    """`kind` says which product: "floats", "dynamic", "static" or "packed", whose addends are the offsets, if any.

    (Tensors are fields: of a tuple of them in an object, MindSpore can lose the types.)
    """

    kind: str = field(kw_only=True)
    scales: Parameter | None = field(kw_only=True, default=None)
    addends: Parameter | None = field(kw_only=True, default=None)
    group_size: int = field(kw_only=True, default=0)
    parts: tuple[StaticPart, ...] = field(kw_only=True, default=())  # of "static"


def graph_weight(fused: Any, weight: Weight, dtype: ms.Type, keep: Keep) -> GraphWeight:
    """`weight`, all of it loaded, for activations of `dtype`; it shares the memory of floats and of int8."""
    common = weight.sizes, weight.in_features, weight.dtype, weight.integers
    if isinstance(weight, FloatInputWeight):
        packed = integers.settle(fused, weight, dtype)
        offsets = None if packed.offsets is None else keep(packed.offsets)
        group_size, scales = packed.group_size, keep(packed.scales)
        values = keep(packed.values)
        return GraphWeight(values, *common, kind="packed", scales=scales, addends=offsets, group_size=group_size)
    if not isinstance(weight, Int8Weight):
        return GraphWeight(keep(weight.data), *common, kind="floats")
    assert weight.integers is not None
    if weight.integers.activations == "dynamic":
        scales, addends = keep(weight.scales), keep(weight.addends)
        return GraphWeight(keep(weight.data), *common, kind="dynamic", scales=scales, addends=addends)
    tensors = (vars(part).values() for part in static_parts(fused, weight, dtype))
    parts = tuple(StaticPart(*map(keep, each)) for each in tensors)
    return GraphWeight(weight.data, *common, kind="static", parts=parts)
