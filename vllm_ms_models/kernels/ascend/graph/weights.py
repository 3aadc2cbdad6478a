"""Loaded weights as what a graph multiplies by: parameters, made once. **Not run on hardware.**"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor

from vllm_ms_models.kernels.ascend import integers
from vllm_ms_models.kernels.ascend.integers import FloatInputWeight
from vllm_ms_models.kernels.ascend.weights import Int8Weight, static_parts
from vllm_ms_models.kernels.weight import Weight

Keep = Callable[[Tensor], Parameter]


@dataclass(frozen=True, eq=False)
class GraphWeight(Weight):
    """`kind` says which product; `operands` are what it takes of the weight, but for floats, which are `data`.

    * "dynamic": rows, scales, addends
    * "static": for each stretch of rows with one input, what that is rounded by (two), rows, scales, addends
    * "packed": values, scales, offsets or None
    """

    kind: str = field(kw_only=True)
    operands: tuple[Any, ...] = field(kw_only=True)
    group_size: int = field(kw_only=True, default=0)


def graph_weight(fused: Any, weight: Weight, dtype: ms.Type, keep: Keep) -> GraphWeight:
    """`weight`, all of it loaded, for activations of `dtype`; it shares the memory of floats and of int8."""
    kind, operands, group_size, data = "floats", (), 0, weight.data
    if isinstance(weight, FloatInputWeight):
        packed = integers.packed(fused, weight, dtype)
        kind, group_size = "packed", packed.group_size
        operands = keep(packed.values), keep(packed.scales), None if packed.offsets is None else keep(packed.offsets)
    elif isinstance(weight, Int8Weight):
        assert weight.integers is not None
        kind = weight.integers.activations
        if kind == "dynamic":
            operands = keep(weight.data), keep(weight.scales), keep(weight.addends)
        else:
            operands = tuple(tuple(map(keep, part)) for part in static_parts(fused, weight, dtype))
    else:
        data = keep(weight.data)
    common = data, weight.sizes, weight.in_features, weight.dtype, weight.integers
    return GraphWeight(*common, kind=kind, operands=operands, group_size=group_size)
