"""Weights of small integers in the reference back end: what `Integers` means, in plain MindSpore operators.

Values are kept row by row, one byte each whatever their bits, scales, zero points and addends beside them, all in
NumPy's memory, where loading writes. Products are MindSpore's, in float32. Those of int8 activations must be exact:
columns are taken _EXACT_COLUMNS at a time, so that no sum, in whatever order, exceeds 2^24, up to which float32 holds
every integer; the sums of these are int32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from vllm_ms_models.kernels import integer_checks
from vllm_ms_models.kernels.interface import Integers, Weight

_EXACT_COLUMNS = 1024  # 128 * 128 * 1024 = 2^24
_WEIGHT_CHUNK = 1 << 21  # weight elements widened to float32 at a time
_matmul_bt = ops.MatMul(transpose_b=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class IntegerWeight(Weight):
    """`values` is the memory of `data`, int8 `[out_features, in_features]`; the rest as `Kernels.load_scales` says.

    `inputs` has scale and offset of each part's static input.
    """

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    addends: np.ndarray
    inputs: np.ndarray


def new_weight(sizes: Sequence[int], in_features: int, integers: Integers) -> IntegerWeight:
    parts = tuple(int(size) for size in sizes)
    integer_checks.check_sizes(parts, in_features)
    rows, groups = sum(parts), integers.groups(in_features)
    values = np.zeros((rows, in_features), np.int8)  # no memory is taken before it is written
    return IntegerWeight(
        data=Tensor.from_numpy(values),
        sizes=parts,
        in_features=in_features,
        dtype=ms.int8,
        integers=integers,
        values=values,
        scales=np.zeros((rows, groups), np.float32),
        zeros=np.zeros((rows, groups), np.int8),
        addends=np.zeros(rows, np.int32),
        inputs=np.tile(np.array((1.0, 0.0), np.float32), (len(parts), 1)),
    )


def load_values(weight: Weight, part: int, first_row: int, values: np.ndarray) -> None:
    integer_checks.check_values(weight, part, first_row, values)
    own = _own(weight)
    own.values[_rows(own, part, first_row, len(values))] = values


def load_scales(
    weight: Weight,
    part: int,
    first_row: int,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    addends: np.ndarray | None,
) -> None:
    integer_checks.check_scales(weight, part, first_row, scales, zeros, addends)
    own = _own(weight)
    rows = _rows(own, part, first_row, len(scales))
    own.scales[rows] = scales
    own.zeros[rows] = 0 if zeros is None else zeros
    own.addends[rows] = 0 if addends is None else addends


def set_input(weight: Weight, part: int, scale: float, offset: int) -> None:
    integer_checks.check_input(weight, part, scale, offset)
    _own(weight).inputs[part] = scale, offset


def products(x: Tensor, weight: Weight) -> Iterator[Tensor]:
    """`x @ weight.T` in float32 without bias, a range of columns at a time; `x` is float32 with at least one row."""
    own, integers = _own(weight), integer_checks.integers_of(weight)
    if integers.activations == "float" and weight.in_features == 0:
        yield Tensor(np.zeros((x.shape[0], weight.out_features), np.float32))
        return
    if integers.activations == "float":
        yield from (_matmul_bt(x, rows) for rows in _widened(own, integers.group_size))
        return
    finite = ops.all(ops.isfinite(x), 1, keep_dims=True)
    x = ops.select(finite, x, 0.0)
    factor = ops.select(finite, ops.ones_like(finite, dtype=ms.float32), float("nan"))
    for part, size in enumerate(own.sizes):
        if size == 0:
            yield mint.empty((x.shape[0], 0), dtype=ms.float32)
            continue
        rows = _rows(own, part, 0, size)
        scale = Tensor(own.scales[rows].reshape(1, -1))
        if integers.activations == "dynamic":
            rounded, scales = round_by_token(x)
            scale = scales * scale
        else:
            rounded = _round_by_input(x, *map(float, own.inputs[part]))
        yield _integer_sums(rounded, own, rows).astype(ms.float32) * scale * factor


def round_by_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of integers in float32, and their scales `[tokens, 1]`; `x` is float32 `[tokens, features]`, all finite."""
    if x.shape[1] == 0:
        return x, Tensor(np.zeros((x.shape[0], 1), np.float32))
    # NumPy divides: the Div operator is off by an ulp, and gives 0 for what is close to it.
    largest = ops.amax(ops.abs(x), 1, True).asnumpy()
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.float32(127) / largest
    factor[~np.isfinite(factor)] = 0
    return ops.round(x * Tensor(factor)), Tensor(largest / np.float32(127))


def _round_by_input(x: Tensor, scale: float, offset: float) -> Tensor:
    inverse = float(np.float32(1) / np.float32(scale))
    return ops.clamp(ops.round(x * inverse) + offset, -128.0, 127.0)


def _integer_sums(rounded: Tensor, weight: IntegerWeight, rows: slice) -> Tensor:
    """`sum_k q_k (w_nk - z_n) + addend_n`, int32."""
    sums = Tensor(weight.addends[rows].reshape(1, -1))
    zeros = Tensor(weight.zeros[rows].reshape(1, -1).astype(np.int32))
    for first in range(0, max(1, weight.in_features), _EXACT_COLUMNS):
        columns = slice(first, first + _EXACT_COLUMNS)
        q = rounded[:, columns].contiguous()
        if q.shape[1]:
            values = Tensor(weight.values[rows, columns].astype(np.float32))
            sums = sums + _matmul_bt(q, values).astype(ms.int32) - q.sum(1, keepdims=True).astype(ms.int32) * zeros
    return ops.broadcast_to(sums, (rounded.shape[0], sums.shape[1]))


def _widened(weight: IntegerWeight, group_size: int) -> Iterator[Tensor]:
    """`s (w - z)` in float32, some rows at a time."""
    step = max(1, _WEIGHT_CHUNK // max(1, weight.in_features))
    for first in range(0, weight.out_features, step):
        rows = slice(first, first + step)
        scales, zeros = weight.scales[rows], weight.zeros[rows]
        if group_size:
            scales, zeros = (np.repeat(a, group_size, 1)[:, : weight.in_features] for a in (scales, zeros))
        centred = ops.sub(Tensor(weight.values[rows].astype(np.float32)), Tensor(zeros.astype(np.float32)))
        yield centred * Tensor(scales)


def _own(weight: Weight) -> IntegerWeight:
    if not isinstance(weight, IntegerWeight):
        raise ValueError(f"The weight is a {type(weight).__name__}; the reference kernels multiply their own only.")
    return weight


def _rows(weight: IntegerWeight, part: int, first_row: int, count: int) -> slice:
    start = sum(weight.sizes[:part]) + first_row
    return slice(start, start + count)
