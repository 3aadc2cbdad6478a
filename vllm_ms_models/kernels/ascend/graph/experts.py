"""Mixtures of experts as parts of a compiled graph. **Not run on hardware.**"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, mint

from vllm_ms_models.kernels.ascend.experts import Stacked, own_choices, rounded_rows
from vllm_ms_models.kernels.ascend.graph.dense import GraphDense
from vllm_ms_models.kernels.ascend.integers import Packed


@dataclass(frozen=True, eq=False)
class GraphStack:
    """`Stacked` as parameters; `whole`: no other rank has experts.

    `kind` is "floats", "dynamic", "static" or "packed"; the addends of that are the offsets, if it has any.
    """

    kind: str
    sizes: tuple[int, ...]
    experts: int
    whole: bool
    values: Parameter
    scales: Parameter | None
    addends: Parameter | None
    inputs: Parameter | None


def graph_stack(
    stacked: Stacked,
    sizes: tuple[int, ...],
    experts: int,
    whole: bool,
    dtype: ms.Type,
    keep: Callable[[Tensor], Parameter],
) -> GraphStack:
    """For rows of `dtype`; shares the memory of the values."""
    values, scales, addends = stacked.values, stacked.scales, stacked.addends
    if isinstance(values, Packed):
        kind = "packed"
        values, scales, addends = values.values, values.scales, values.offsets
    elif scales is None:
        kind = "floats"
    else:
        kind = "dynamic" if stacked.inputs is None else "static"
        scales = scales.astype(dtype) if dtype == ms.bfloat16 else scales
    optional = (None if x is None else keep(x) for x in (scales, addends, stacked.inputs))
    return GraphStack(kind, sizes, experts, whole, keep(values), *optional)


class GraphExperts:
    """What `Experts` does, by calls of `fused`."""

    def __init__(self, fused: Any, dense: GraphDense) -> None:
        self._ops, self._dense = fused, dense

    def multiply(
        self,
        x: Tensor,
        gate_up: GraphStack,
        down: GraphStack,
        ids: Tensor,
        shares: Tensor,
        activation: str,
        addend: Tensor | None,
        first_expert: int,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        """`Kernels.experts`."""
        experts = gate_up.experts
        if gate_up.whole:
            chosen = ids
            rows, places, counts = self._ops.route(x, chosen, experts)
        else:
            chosen = own_choices(ids, first_expert, experts)
            rows, places, every = self._ops.route(x, chosen, experts + 1)
            counts = every[:experts]
        counts = counts.astype(ms.int64)
        owners = chosen if gate_up.whole and gate_up.kind != "static" else self._ops.ascending(chosen.reshape(-1))
        product = self._product(rows, gate_up, counts, owners, gate_up_bias)
        product = self._product(self._dense.gate(product, gate_up.sizes, activation), down, counts, owners, down_bias)
        if not gate_up.whole:  # rows of others may be anything
            product = self._ops.fill(product, mint.ge(owners, experts).reshape(-1, 1), 0.0)
        result = self._ops.unpermute(product, places, shares)
        return result if addend is None else result + addend

    def _product(self, rows: Tensor, stack: GraphStack, counts: Tensor, owners: Tensor, bias: Tensor | None) -> Tensor:
        """`[rows, out]` in the dtype of `rows`; `owners` of static inputs: each row's expert."""
        if bias is not None:
            bias = self._dense.constant(bias, ms.float16 if rows.dtype == ms.float16 else ms.float32)
        values, scales, addends = stack.values, stack.scales, stack.addends
        if stack.kind == "floats":
            return self._ops.grouped_matmul(rows, values, counts, bias)
        if stack.kind == "packed":
            return self._ops.grouped_weight_quant_matmul(rows, values, counts, scales, addends, bias)
        if stack.kind == "dynamic":
            rounded, token_scales = self._ops.quantize_by_token(rows)
            return self._ops.grouped_quant_matmul(rounded, values, counts, scales, addends, token_scales, rows.dtype)
        own = self._ops.gather(stack.inputs, mint.clamp(owners, 0, stack.experts - 1))
        rounded = rounded_rows(rows, own[:, 0:1], own[:, 1:2])
        return self._ops.grouped_quant_matmul(rounded, values, counts, scales, addends, None, rows.dtype)
