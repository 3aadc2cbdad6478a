"""Low-rank adapters in the reference back end (`LowRank` in low_rank.py), one adapter's rows after the other's."""

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models.kernels.low_rank import Addend, LowRank, reduced_width
from vllm_ms_models.kernels.reference_memory import memory
from vllm_ms_models.kernels.weight import Weight

Product = Callable[[Tensor, Weight], Tensor]
"""`x @ weight.T` in float32."""


def _rows_of(rows: Tensor, number: int) -> np.ndarray:
    return np.flatnonzero(rows.asnumpy() == number)


def _taken(x: Tensor, rows: np.ndarray) -> Tensor:
    """These rows of `x`, in float32."""
    return Tensor.from_numpy(np.ascontiguousarray(memory(x)[rows]).astype(np.float32))


def reduce(x: Tensor, rows: Tensor, adapters: Sequence[LowRank | None], product: Product) -> Addend:
    numbers = rows.asnumpy()
    if numbers.size and numbers.max() >= len(adapters):
        raise ValueError(f"a row has adapter {numbers.max()}; there are {len(adapters)}")
    parts = max((len(adapter.ranks) for adapter in adapters if adapter), default=0)
    width = reduced_width(adapters)
    reduced = np.zeros((x.shape[0], parts, width), np.float32)
    for number, adapter in enumerate(adapters):
        own = _rows_of(rows, number)
        if adapter is None or not own.size:
            continue
        columns = product(_taken(x, own), adapter.down)
        first = 0
        for part, (rank, scale) in enumerate(zip(adapter.ranks, adapter.scales, strict=True)):
            if rank:
                reduced[own, part, :rank] = (columns[:, first : first + rank] * scale).asnumpy()
            first += rank
    return Addend(rows, tuple(adapters), Tensor.from_numpy(reduced.reshape(x.shape[0], parts * width)))


def add(result: Tensor, addend: Addend, product: Product) -> Tensor:
    """`result`, float32 `[tokens, out_features]`, with the second half of each row's adapter."""
    total = result.asnumpy()  # shares memory with the tensor
    reduced = addend.reduced.asnumpy()
    for number, adapter in enumerate(addend.adapters):
        own = _rows_of(addend.rows, number)
        if adapter is None or not own.size:
            continue
        width, first = reduced.shape[1] // len(adapter.ranks), 0
        for part, (rank, size) in enumerate(zip(adapter.ranks, adapter.up.sizes, strict=True)):
            inputs = np.zeros((own.size, adapter.up.in_features), np.float32)
            inputs[:, :rank] = reduced[own, part * width : part * width + rank]
            columns = slice(first, first + size)
            added = product(Tensor.from_numpy(inputs), adapter.up)[:, columns]
            before = Tensor.from_numpy(np.ascontiguousarray(total[own, columns]))
            total[own, columns] = (before + added).asnumpy()
            first += size
    assert result.dtype == ms.float32
    return result
