"""Low-rank adapters on Ascend: plain products in float32, one adapter after the other. **Not run on hardware.**

Every adapter that a step has multiplies all its rows, and those of others are dropped. That is some work too many for
batches of several adapters, but nothing is gathered, and ranks are small.
"""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models.kernels.low_rank import Addend, LowRank, reduced_width
from vllm_ms_models.kernels.weight import Weight


class LowRankProducts:
    """`Kernels.reduce` and what it gives, by calls of `fused` (the functions of `operators`)."""

    def __init__(self, fused: Any) -> None:
        self._ops = fused
        self._rows: Tensor | None = None  # the last step's, in the host's memory
        self._masks: dict[int, Tensor] = {}  # of each of its adapters, bool [tokens, 1] on the device

    def reduce(self, x: Tensor, rows: Tensor, adapters: Sequence[LowRank | None]) -> Addend:
        masks = self._masks_of(rows)
        if masks and max(masks) >= len(adapters):
            raise ValueError(f"a row has adapter {max(masks)}; there are {len(adapters)}")
        parts = max((len(adapter.ranks) for adapter in adapters if adapter), default=0)
        width = reduced_width(adapters)
        total = mint.zeros((x.shape[0], parts * width), dtype=ms.float32)
        for number, mask in masks.items():
            adapter = adapters[number]
            if adapter is not None and any(adapter.ranks):
                columns = self._product(x, adapter.down)
                total = mint.where(mask, self._spread(columns, adapter, width), total)
        return Addend(rows, tuple(adapters), total)

    def add(self, product: Tensor, addend: Addend) -> Tensor:
        """`product` `[tokens, out_features]` with what the adapters add, in float32."""
        product = product.astype(ms.float32)
        for number, mask in self._masks_of(addend.rows).items():
            adapter = addend.adapters[number]
            if adapter is not None and any(adapter.ranks):
                added = self._expanded(addend.reduced, adapter)
                product = mint.where(mask, product + added, product)
        return product

    def _masks_of(self, rows: Tensor) -> dict[int, Tensor]:
        """Which rows have each adapter that some have. All linears of a step pass the same rows: it is made once."""
        if self._rows is not rows:
            numbers = rows.asnumpy()
            self._masks = {
                int(number): self._ops.to_device(Tensor.from_numpy((numbers == number).reshape(-1, 1)))
                for number in np.unique(numbers[numbers >= 0])
            }
            self._rows = rows
        return self._masks

    def _product(self, x: Tensor, weight: Weight) -> Tensor:
        result: Tensor = self._ops.matmul(x.astype(ms.float32).contiguous(), weight.data.astype(ms.float32))
        return result

    @staticmethod
    def _spread(columns: Tensor, adapter: LowRank, width: int) -> Tensor:
        """The columns of each part, scaled, in `width` of its own; beyond its rank there are zeros."""
        parts, first = [], 0
        for rank, scale in zip(adapter.ranks, adapter.scales, strict=True):
            if rank:
                parts.append(mint.narrow(columns, 1, first, rank) * scale)
            if rank < width:
                parts.append(mint.zeros((columns.shape[0], width - rank), dtype=ms.float32))
            first += rank
        return mint.cat(parts, 1)

    def _expanded(self, reduced: Tensor, adapter: LowRank) -> Tensor:
        """The second half: `[tokens, out_features]`, 0 where a part has no rank."""
        width, first, parts = reduced.shape[1] // len(adapter.ranks), 0, []
        matrix = adapter.up.data.astype(ms.float32)
        for number, (rank, size) in enumerate(zip(adapter.ranks, adapter.up.sizes, strict=True)):
            if rank and size:
                inputs = mint.narrow(reduced, 1, number * width, rank).contiguous()
                block = mint.narrow(mint.narrow(matrix, 0, first, size), 1, 0, rank).contiguous()
                parts.append(self._ops.matmul(inputs, block))
            elif size:
                parts.append(mint.zeros((reduced.shape[0], size), dtype=ms.float32))
            first += size
        return parts[0] if len(parts) == 1 else mint.cat(parts, 1)
