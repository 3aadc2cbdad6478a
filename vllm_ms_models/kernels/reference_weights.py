"""Matrices of floats in the reference back end, row by row."""

from collections.abc import Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models.kernels.reference_memory import NUMPY, copy, memory
from vllm_ms_models.kernels.weight import Weight

_CHUNK = 1 << 21  # weight elements widened to float32 at a time: 8 MB, which a last-level cache holds


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def new_weight(sizes: Sequence[int], in_features: int, dtype: ms.Type) -> Weight:
    """The values are kept row by row, `[sum(sizes), in_features]` in `dtype`."""
    _require(dtype in NUMPY, f"a weight is float32, float16 or bfloat16, not {dtype}")
    # NumPy's zeros take no memory before they are written: a model that does not fit is refused in time.
    zeros = np.zeros((sum(sizes), in_features), np.int16 if dtype == ms.bfloat16 else NUMPY[dtype])
    data = Tensor.from_numpy(zeros)
    data = data.view(ms.bfloat16) if dtype == ms.bfloat16 else data
    return Weight(data, tuple(sizes), in_features, dtype)


def load_rows(weight: Weight, part: int, first_row: int, source: np.ndarray) -> None:
    _require(0 <= part < len(weight.sizes), f"the weight has {len(weight.sizes)} parts, no part {part}")
    _require(
        source.ndim == 2 and source.shape[1] == weight.in_features,
        f"expected rows of {weight.in_features} features, got an array of shape {source.shape}",
    )
    last_row = first_row + source.shape[0]
    _require(
        0 <= first_row and last_row <= weight.sizes[part],
        f"rows {first_row} to {last_row} do not fit in part {part}, which has {weight.sizes[part]}",
    )
    start = sum(weight.sizes[:part])
    copy(memory(weight.data)[start + first_row : start + last_row], source)


def float32_rows(weight: Weight) -> Iterator[Tensor]:
    """The rows of `weight` in float32, a chunk at a time, so that only a chunk exists twice."""
    if weight.dtype == ms.float32:
        yield weight.data
        return
    values = memory(weight.data)
    step = max(1, _CHUNK // weight.in_features)
    for first in range(0, weight.out_features, step):
        source = values[first : first + step]
        rows = mint.empty(source.shape, dtype=ms.float32)
        copy(memory(rows), source)
        yield rows
