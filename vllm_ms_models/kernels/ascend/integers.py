"""Weights of integers for activations of floats (W8A16, W4A16) on Ascend. **Not run on hardware.**

WeightQuantBatchMatmul and, for experts, GroupedMatmulV4 take inputs by outputs, `[in, out]`, and 4-bit values two to a
byte. So what is loaded stays on the host, row by row, until the first product packs it; then the host's copy goes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models.kernels import integer_checks
from vllm_ms_models.kernels.ascend import dtypes
from vllm_ms_models.kernels.weight import Integers, Weight

_LARGEST = 65535  # inputs and outputs that the operator takes
_GROUP_STEP = 32  # its groups are multiples of


@dataclass
class Loaded:
    """What the checkpoint says, until it is packed."""

    values: np.ndarray  # int8 [out, in]
    scales: np.ndarray  # float32 [out, groups]
    zeros: np.ndarray  # int8 [out, groups]


@dataclass(frozen=True)
class Packed:
    """The operator's arguments."""

    values: Tensor
    scales: Tensor
    offsets: Tensor | None  # those of the operator are added: zero points with the other sign
    group_size: int


@dataclass(frozen=True, eq=False)
class FloatInputWeight(Weight):
    """`state` has one entry: `Loaded`, then `Packed` or, as an expert among others, None. `data` is empty."""

    state: list[Loaded | Packed | None] = field(kw_only=True)

    @property
    def is_stacked(self) -> bool:
        return self.state[0] is None

    @property
    def loaded(self) -> Loaded:
        """ValueError once the weight has been multiplied."""
        (state,) = self.state
        if not isinstance(state, Loaded):
            raise ValueError("The weight is in use and packed: load all of it before the first product.")
        return state


def new_weight(sizes: Sequence[int], in_features: int, integers: Integers) -> FloatInputWeight:
    """NotImplementedError for what WeightQuantBatchMatmul does not take."""
    integer_checks.check_sizes(tuple(sizes), in_features)
    out, groups = sum(sizes), integers.groups(in_features)
    if groups > 1 and integers.group_size % _GROUP_STEP:
        raise NotImplementedError(
            f"The Ascend kernels take weights in groups of multiples of {_GROUP_STEP} inputs, not of "
            f"{integers.group_size}; serve this model with VLLM_MS_DEVICE=cpu."
        )
    if max(out, in_features) > _LARGEST:
        raise NotImplementedError(
            f"The Ascend kernels multiply quantized weights of at most {_LARGEST} inputs and outputs, not of "
            f"{in_features} and {out}; use a larger --tensor-parallel-size, or serve with VLLM_MS_DEVICE=cpu."
        )
    loaded = Loaded(
        np.zeros((out, in_features), np.int8), np.zeros((out, groups), np.float32), np.zeros((out, groups), np.int8)
    )
    empty = Tensor.from_numpy(np.zeros(0, np.int8))
    return FloatInputWeight(empty, tuple(sizes), in_features, ms.int8, integers, state=[loaded])


def load_values(weight: FloatInputWeight, part: int, first_row: int, values: np.ndarray) -> None:
    integer_checks.check_values(weight, part, first_row, values)
    weight.loaded.values[_rows(weight, part, first_row, len(values))] = values


def load_scales(
    weight: FloatInputWeight,
    part: int,
    first_row: int,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    addends: np.ndarray | None,
) -> None:
    integer_checks.check_scales(weight, part, first_row, scales, zeros, addends)
    rows = _rows(weight, part, first_row, len(scales))
    weight.loaded.scales[rows] = scales
    weight.loaded.zeros[rows] = 0 if zeros is None else zeros


def product(fused: Any, x: Tensor, weight: FloatInputWeight) -> Tensor:
    """`x @ weight.T` in the dtype of `x`; scales are rounded to that. At least one row and one output."""
    (state,) = weight.state
    if x.dtype not in dtypes.TAKEN:  # while loading only: to see what the matrix makes of unit vectors
        matrix = fused.to_device(Tensor.from_numpy(_widened(weight)))
        result: Tensor = fused.matmul(fused.to_device(x.astype(ms.float32)), matrix)
        return result
    if not isinstance(state, Packed) or state.scales.dtype != x.dtype:
        state = settle(fused, weight, x.dtype)
    result = fused.weight_quant_matmul(x, state.values, state.scales, state.offsets, state.group_size)
    return result


def settle(fused: Any, weight: FloatInputWeight, dtype: ms.Type) -> Packed:
    """Pack it for activations of `dtype`; what was loaded goes. ValueError if that was done before."""
    packed = _packed(fused, weight, weight.loaded, dtype)
    weight.state[0] = packed
    return packed


def stacked(fused: Any, weights: Sequence[FloatInputWeight], dtype: ms.Type) -> Packed:
    """Those of all experts, with one more axis in front, for GroupedMatmulV4; their own copies go."""
    loaded = [weight.loaded for weight in weights]
    together = Loaded(*(np.stack([getattr(one, name) for one in loaded]) for name in ("values", "scales", "zeros")))
    packed = _packed(fused, weights[0], together, dtype)
    for weight in weights:
        weight.state[0] = None
    return packed


def can_be_stacked(weights: Sequence[FloatInputWeight]) -> bool:
    """Whether GroupedMatmulV4 takes them: with one scale to an output, or 4 bits in even groups without zero points."""
    integers, inputs = weights[0].integers, weights[0].in_features
    assert integers is not None
    loaded = [weight.state[0] for weight in weights if isinstance(weight.state[0], Loaded)]
    if len(loaded) < len(weights) or (integers.bits == 4 and weights[0].out_features % 2):
        return False
    if integers.groups(inputs) == 1:
        return True
    return integers.bits == 4 and inputs % integers.group_size == 0 and not any(one.zeros.any() for one in loaded)


def _packed(fused: Any, weight: FloatInputWeight, loaded: Loaded, dtype: ms.Type) -> Packed:
    """The operators' arguments for `loaded`, which may have another axis in front."""
    assert weight.integers is not None
    values = loaded.values.swapaxes(-1, -2)
    if weight.integers.bits == 4 and weight.out_features % 2 == 0:
        nibbles = values.view(np.uint8) & 15
        pairs = np.ascontiguousarray(nibbles[..., ::2] | nibbles[..., 1::2] << 4)
        integers = Tensor(pairs.view(np.int8), ms.qint4x2)
    else:
        integers = Tensor.from_numpy(np.ascontiguousarray(values))
    scales, offsets = loaded.scales.swapaxes(-1, -2), -loaded.zeros.swapaxes(-1, -2).astype(np.float32)
    one_group = scales.shape[-2] == 1
    if one_group:
        scales, offsets = scales[..., 0, :], offsets[..., 0, :]
    return Packed(
        fused.to_device(integers),
        fused.to_device(dtypes.tensor(scales, dtype)),
        fused.to_device(dtypes.tensor(offsets, dtype)) if offsets.any() else None,
        0 if one_group else weight.integers.group_size,
    )


def _widened(weight: FloatInputWeight) -> np.ndarray:
    """The matrix in float32."""
    assert weight.integers is not None
    loaded, size = weight.loaded, weight.integers.group_size or max(1, weight.in_features)
    scales, zeros = (
        np.repeat(each.astype(np.float32), size, 1)[:, : weight.in_features] for each in (loaded.scales, loaded.zeros)
    )
    return (loaded.values - zeros) * scales


def _rows(weight: Weight, part: int, first_row: int, count: int) -> slice:
    start = sum(weight.sizes[:part]) + first_row
    return slice(start, start + count)
