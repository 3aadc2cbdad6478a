"""Mixtures of experts on Ascend: rows sorted by expert, one grouped product for all of them. **Not run on hardware.**

The products of the experts' weights take all of them in one tensor `[experts, in, out]`, which is made at the first
call; the weights it was made of are empty afterwards. The choices of experts that another rank owns are sorted behind
all others, are not multiplied, and count as 0.

What GroupedMatmulV4 has no place for goes one expert after the other through the linear kernels, rows and sums on the
host: groups of weights of 8 bits or with zero points, static inputs that differ between gate and up, and biases of int8
products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend import dtypes, integers
from vllm_ms_models.kernels.ascend.dense import Dense
from vllm_ms_models.kernels.ascend.integers import FloatInputWeight
from vllm_ms_models.kernels.ascend.weights import Int8Weight
from vllm_ms_models.kernels.interface import Kernels, Weight

_OTHERS = "These experts were multiplied before together with others; always pass the same ones."


@dataclass(frozen=True, eq=False)
class Stacked:
    """The weights of all experts of this rank, in one tensor each; `kind` is that of their product.

    "floats"; "packed", whose addends are the offsets, if there are any; "dynamic"; "static".
    """

    kind: str
    sizes: tuple[int, ...]  # outputs of an expert
    values: Tensor  # [experts, in, out]
    scales: Tensor | None = None
    addends: Tensor | None = None  # of int8: int32 [experts, out]
    inputs: Tensor | None = None  # of "static": float32 [experts, 2], what to multiply them by, and their offset
    whole: bool = False  # whether no other rank is known to have any

    @property
    def experts(self) -> int:
        return self.values.shape[0]


@dataclass(frozen=True)
class Layer:
    """What the first call decided for the experts of a layer: stacks of gate and up and of down, or one by one."""

    weights: tuple[Sequence[Weight], Sequence[Weight]]
    biased: tuple[bool, bool]
    stacks: tuple[Stacked, Stacked] | None

    def is_of(self, weights: tuple[Sequence[Weight], Sequence[Weight]], biased: tuple[bool, bool]) -> bool:
        same = all(
            len(own) == len(given) and own[-1] is given[-1] for own, given in zip(self.weights, weights, strict=True)
        )
        return same and self.biased == biased


class Experts:
    """`Kernels.experts` by calls of `fused` (the functions of `operators`)."""

    def __init__(self, fused: Any, dense: Dense) -> None:
        self._ops, self._dense = fused, dense
        self._numbers: Tensor | None = None
        self._biases: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._layers: dict[int, Layer] = {}  # by the id of the first weight, which lives as long as its entry

    def multiply(
        self,
        kernels: Kernels,
        x: Tensor,
        gate_up: Sequence[Weight],
        down: Sequence[Weight],
        ids: Tensor,
        shares: Tensor,
        activation: str,
        addend: Tensor | None = None,
        first_expert: int = 0,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Tensor:
        """`Kernels.experts`; `kernels` multiply what has no grouped product."""
        dtypes.check(x)
        biases = gate_up_bias, down_bias
        _check(x, gate_up, down, ids, shares, addend, biases)
        if x.shape[0] == 0:
            return mint.zeros(x.shape, dtype=x.dtype)
        stacks = self.stacks((gate_up, down), (gate_up_bias is not None, down_bias is not None), x.dtype)
        if stacks is None:
            return self.one_by_one(kernels, x, gate_up, down, ids, shares, activation, addend, first_expert, biases)
        return self.grouped(x, stacks, ids, shares, activation, addend, first_expert, biases)

    def grouped(
        self,
        x: Tensor,
        stacks: tuple[Stacked, Stacked],
        ids: Tensor,
        shares: Tensor,
        activation: str,
        addend: Tensor | None,
        first_expert: int,
        biases: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        """`Kernels.experts` of what fits, of stacked weights."""
        gate_up, down = stacks
        chosen = ids.astype(ms.int32)
        if gate_up.whole:
            rows, places, counts = self._ops.route(x, chosen, gate_up.experts)
        else:
            chosen = _own_choices(chosen, first_expert, gate_up.experts)
            rows, places, every = self._ops.route(x, chosen, gate_up.experts + 1)
            counts = self.part(every, 0, 0, gate_up.experts)
        counts = counts.astype(ms.int64)
        product = self._product(rows, gate_up, counts, chosen, biases[0])
        gated = self._dense.gate(product, gate_up.sizes, activation)
        product = self._product(gated, down, counts, chosen, biases[1])
        if not gate_up.whole:  # rows of others may be anything
            product = self._ops.fill(product, self.foreign(product, counts, chosen), 0.0)
        result = self._ops.unpermute(product, places, shares)
        return result if addend is None else result + addend

    def part(self, x: Tensor, axis: int, first: int, count: int) -> Tensor:
        """So many of the first or second axis."""
        return mint.narrow(x, axis, first, count)

    def foreign(self, rows: Tensor, counts: Tensor, chosen: Tensor) -> Tensor:
        """Which of `rows`, which lie by experts, are of another rank's: bool `[rows, 1]`."""
        return mint.ge(self._positions(rows.shape[0]), mint.sum(counts)).reshape(-1, 1)

    def one_by_one(
        self,
        kernels: Kernels,
        x: Tensor,
        gate_up: Sequence[Weight],
        down: Sequence[Weight],
        ids: Tensor,
        shares: Tensor,
        activation: str,
        addend: Tensor | None,
        first_expert: int,
        biases: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        """The experts that tokens have chosen, in ascending order; float32 sums, on the host."""
        chosen, factors = (self._ops.to_host(each).asnumpy() for each in (ids, shares))
        total = np.zeros(x.shape, np.float32)
        if addend is not None:
            total += self._ops.to_host(addend.astype(ms.float32)).asnumpy()
        for expert in np.unique(chosen - first_expert).tolist():
            if not 0 <= expert < len(gate_up):
                continue  # another rank's
            rows, choices = np.nonzero(chosen == expert + first_expert)
            taken = self._ops.gather(x, self._ops.to_device(Tensor.from_numpy(rows.astype(np.int32))))
            of_gate_up, of_down = (self._bias(bias, expert) for bias in biases)
            gated = kernels.linear_gated(taken, gate_up[expert], activation, of_gate_up)
            product = kernels.linear(gated, down[expert], of_down, ms.float32)
            np.add.at(total, rows, self._ops.to_host(product).asnumpy() * factors[rows, choices, None])
        return self._ops.to_device(Tensor.from_numpy(total)).astype(x.dtype)

    def _bias(self, bias: Tensor | None, expert: int) -> Tensor | None:
        """An expert's row, the same tensor each time: what linears make of their biases is kept for it."""
        if bias is None:
            return None
        key = id(bias), expert
        if key not in self._biases:
            self._biases[key] = bias, bias[expert].contiguous()
        return self._biases[key][1]

    def _product(self, rows: Tensor, stacked: Stacked, counts: Tensor, chosen: Tensor, bias: Tensor | None) -> Tensor:
        """`[rows, out]` in the dtype of `rows`; `chosen` `[tokens, k]` are the rows' experts, unsorted."""
        values, scales, addends = stacked.values, stacked.scales, stacked.addends
        if bias is not None:
            bias = self._dense.constant(bias, ms.float16 if rows.dtype == ms.float16 else ms.float32)
        if stacked.kind == "floats":
            return self._ops.grouped_matmul(rows, values, counts, bias)
        if stacked.kind == "packed":
            return self._ops.grouped_weight_quant_matmul(rows, values, counts, scales, addends, bias)
        if stacked.kind == "dynamic":
            rounded, token_scales = self._ops.quantize_by_token(rows)
            return self._ops.grouped_quant_matmul(rounded, values, counts, scales, addends, token_scales, rows.dtype)
        rounded = self._round(rows, stacked, chosen)
        return self._ops.grouped_quant_matmul(rounded, values, counts, scales, addends, None, rows.dtype)

    def _round(self, rows: Tensor, stacked: Stacked, chosen: Tensor) -> Tensor:
        """Int8 `rows`, each by the static input of its expert: QuantV2 has one scale for all rows."""
        owners = mint.clamp(self._ops.ascending(chosen.reshape(-1)), 0, stacked.experts - 1)
        own = self._ops.gather(stacked.inputs, owners)
        rounded = mint.round(rows.astype(ms.float32) * self.part(own, 1, 0, 1)) + self.part(own, 1, 1, 1)
        return mint.clamp(rounded, -128.0, 127.0).astype(ms.int8)

    def stacks(
        self, weights: tuple[Sequence[Weight], Sequence[Weight]], biased: tuple[bool, bool], dtype: ms.Type
    ) -> tuple[Stacked, Stacked] | None:
        """Those of gate and up, and of down, for rows of `dtype`; None if GroupedMatmulV4 does not multiply both."""
        return self._layer(weights, biased, dtype).stacks

    def _layer(
        self, weights: tuple[Sequence[Weight], Sequence[Weight]], biased: tuple[bool, bool], dtype: ms.Type
    ) -> Layer:
        """ValueError unless a layer has the same weights each time, with or without biases: they are stacked once."""
        first = weights[0][0]
        found = self._layers.get(id(first))
        if found is None:
            stacks = None
            for each in weights:
                _check_new(each)
            if all(map(_grouped, weights, biased)):
                stacks = self._stack(weights[0], dtype), self._stack(weights[1], dtype)
            found = Layer((tuple(weights[0]), tuple(weights[1])), biased, stacks)
            self._layers[id(first)] = found
        if not found.is_of(weights, biased):
            raise ValueError(_OTHERS)
        return found

    def _stack(self, weights: Sequence[Weight], dtype: ms.Type) -> Stacked:
        sizes = weights[0].sizes
        to_pack = [weight for weight in weights if isinstance(weight, FloatInputWeight)]
        if to_pack:
            packed = integers.stacked(self._ops, to_pack, dtype)
            return Stacked("packed", sizes, packed.values, packed.scales, packed.offsets)
        values = self._stack_values(weights)
        int8 = [weight for weight in weights if isinstance(weight, Int8Weight)]
        if not int8:
            return Stacked("floats", sizes, values)
        scales, addends = (
            mint.cat([getattr(weight, name).reshape(1, -1) for weight in int8], 0) for name in ("scales", "addends")
        )
        scales = scales.astype(ms.bfloat16) if dtype == ms.bfloat16 else scales
        inputs = self._inputs(int8)
        return Stacked("dynamic" if inputs is None else "static", sizes, values, scales, addends, inputs)

    def _stack_values(self, weights: Sequence[Weight]) -> Tensor:
        first = weights[0]
        values = mint.zeros((len(weights), first.in_features, first.out_features), dtype=first.dtype)
        for number, weight in enumerate(weights):
            rows = mint.permute(weight.data, (1, 0)).contiguous()
            self._ops.write_rows(values, number, rows.reshape(1, *rows.shape))
            # One expert more at a time, not twice all of them.
            weight.data.assign_value(mint.zeros((0, first.in_features), dtype=first.dtype))
        return values

    def _inputs(self, weights: Sequence[Int8Weight]) -> Tensor | None:
        assert weights[0].integers is not None
        if weights[0].integers.activations == "dynamic":
            return None
        scales, offsets = np.array([weight.inputs[0] for weight in weights], np.float32).T
        inputs = Tensor.from_numpy(np.stack((np.float32(1) / scales, offsets), 1))
        return self._ops.to_device(inputs)

    def _positions(self, rows: int) -> Tensor:
        """int64 0 to `rows`: a part of the most that there were."""
        if self._numbers is None or self._numbers.shape[0] < rows:
            self._numbers = self._ops.to_device(Tensor.from_numpy(np.arange(rows)))
        return mint.narrow(self._numbers, 0, 0, rows)


def _own_choices(ids: Tensor, first: int, experts: int) -> Tensor:
    """Choices counted from this rank's first expert, int32; a number behind the last is another rank's."""
    local = ids - first
    inside = mint.clamp(local, 0, experts - 1)
    known = mint.eq(local, inside).astype(ms.int32)
    return inside * known + (1 - known) * experts


def _check(
    x: Tensor,
    gate_up: Sequence[Weight],
    down: Sequence[Weight],
    ids: Tensor,
    shares: Tensor,
    addend: Tensor | None,
    biases: Sequence[Tensor | None],
) -> None:
    """ValueError for what does not fit together."""
    if len(gate_up) != len(down) or ids.shape != shares.shape or ids.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"{len(gate_up)} and {len(down)} weights, ids {ids.shape} and shares {shares.shape} do not fit "
            f"{x.shape[0]} tokens"
        )
    first, second = gate_up[0], down[0]
    half = first.sizes[0]
    if first.sizes != (half, half) or (first.in_features, second.in_features) != (x.shape[1], half):
        raise ValueError(
            f"experts of {first.in_features} inputs, {first.sizes} and then {second.in_features} do not fit rows of "
            f"{x.shape[1]}"
        )
    if addend is not None and addend.shape != x.shape:
        raise ValueError(f"the addend is {addend.shape}, x is {x.shape}")
    for bias, weights in zip(biases, (gate_up, down), strict=True):
        if bias is not None and bias.shape != (len(weights), weights[0].out_features):
            raise ValueError(f"the biases are {bias.shape}, of {len(weights)} experts with other outputs")


def _check_new(weights: Sequence[Weight]) -> None:
    """ValueError if one of them was stacked before."""
    for weight in weights:
        if weight.is_stacked if isinstance(weight, FloatInputWeight) else weight.data.size == 0:
            raise ValueError(_OTHERS)


def _grouped(weights: Sequence[Weight], biased: bool) -> bool:
    """Whether GroupedMatmulV4 multiplies them."""
    packed = [weight for weight in weights if isinstance(weight, FloatInputWeight)]
    if packed:
        return len(packed) == len(weights) and integers.can_be_stacked(packed)
    int8 = [weight for weight in weights if isinstance(weight, Int8Weight)]
    return not int8 or (not biased and all(len(set(weight.inputs)) == 1 for weight in int8))
