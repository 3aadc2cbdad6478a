"""Attention on Ascend where no fused operator has what it needs. **Not run on hardware.**

None of MindSpore 2.10's operators of attention (PagedAttention, FlashAttentionScore, IncreFlashAttention,
PromptFlashAttention, FusedInferAttentionScore) has a parameter for soft caps or for sinks, none reads this package's
rows of int8, and heads that are not multiples of 16 are not documented for them. Here it is made of plain operators of
the device, sequence by sequence, in float32: right, but slow.
"""

from dataclasses import dataclass
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend.caches import head_size_of, widened
from vllm_ms_models.kernels.ascend.prepared import Prepared

SCORES = 1 << 26  # attention scores at a time: 256 MB
MASKED = -3.0e38


@dataclass(frozen=True)
class Pages:
    """Keys and values of some positions of a sequence, float32 `[kv_heads, positions, size]` each.

    Those of int8 are without their scales, which are `[kv_heads, 1, positions]`.
    """

    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, Tensor] | None
    first: int  # the first of the positions

    @property
    def positions(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True)
class PlainAttention:
    """What one layer asks of `Kernels.paged_attention`, by calls of `fused` (the functions of `operators`)."""

    fused: Any
    scale: float
    window: int | None
    soft_cap: float | None
    causal: bool
    sinks: Tensor | None  # float32 [heads], on the device

    def attend(self, query: Tensor, cache: Tensor, step: Prepared) -> Tensor:
        """Of `query` `[step.rows, heads * size]`."""
        heads = query.shape[1] // head_size_of(cache)
        results = []
        row = 0
        for number, (count, length) in enumerate(zip(step.queries.tolist(), step.lengths.tolist(), strict=True)):
            lowest = 0 if self.window is None else max(0, length - count - self.window + 1)
            pages = self._pages(cache, step, number, lowest, length)
            chunk = max(1, SCORES // (heads * pages.positions))
            for first in range(row, row + count, chunk):
                rows = min(chunk, row + count - first)
                # One row is its sequence's last, and the pages begin with its window.
                seen = None if count == 1 else self._seen(step, first, rows, pages)
                results.append(self._attend(mint.narrow(query, 0, first, rows), pages, seen))
            row += count
        return results[0] if len(results) == 1 else mint.cat(results)

    def _pages(self, cache: Tensor, step: Prepared, number: int, first: int, stop: int) -> Pages:
        """Positions `first` to `stop` of sequence `number`."""
        blocks, _, block_size, kv_heads, width = cache.shape
        begin, end = first // block_size, -(-stop // block_size)
        numbers = mint.narrow(mint.narrow(step.block_tables, 0, number, 1).reshape(-1), 0, begin, end - begin)
        taken = self.fused.gather(cache.view(blocks, -1), numbers.contiguous())
        halves = taken.view(end - begin, 2, block_size, kv_heads, width)
        rows = []
        for half in range(2):
            whole = mint.narrow(halves, 1, half, 1).reshape(-1, kv_heads, width)
            part = mint.narrow(whole, 0, first - begin * block_size, stop - first)
            rows.append(mint.permute(part, (1, 0, 2)).contiguous())
        if cache.dtype != ms.int8:
            keys, values = (x.astype(ms.float32) for x in rows)
            return Pages(keys, values, None, first)
        (keys, of_keys), (values, of_values) = (widened(x) for x in rows)
        scales = of_keys.reshape(kv_heads, 1, -1), of_values.reshape(kv_heads, 1, -1)
        return Pages(keys, values, scales, first)

    def _seen(self, step: Prepared, first: int, rows: int, pages: Pages) -> Tensor | None:
        """Which of the pages' positions each row sees, bool `[rows, positions]`; None: all of them."""
        if not self.causal and self.window is None:
            return None
        places, numbers = step.places()
        own = mint.narrow(places, 0, first, rows)
        others = mint.narrow(numbers, 0, pages.first, pages.positions)
        seen = mint.le(others, own) if self.causal else None
        if self.window is not None:
            near = mint.gt(others, own - self.window)
            seen = near if seen is None else mint.logical_and(seen, near)
        return seen

    def _attend(self, query: Tensor, pages: Pages, seen: Tensor | None) -> Tensor:
        rows, features = query.shape
        kv_heads, positions, size = pages.keys.shape
        group = features // size // kv_heads
        grouped = mint.permute(query.reshape(rows, kv_heads, group, size), (1, 2, 0, 3))
        grouped = grouped.astype(ms.float32).reshape(kv_heads, group * rows, size).contiguous()
        scores = self.fused.batch_matmul(grouped, pages.keys.contiguous(), True)
        scores = (scores if pages.scales is None else scores * pages.scales[0]) * self.scale
        if self.soft_cap is not None:
            scores = self.fused.tanh(scores * (1.0 / self.soft_cap)) * self.soft_cap
        scores = scores.reshape(kv_heads, group, rows, positions)
        if seen is not None:
            scores = mint.where(seen, scores, MASKED)
        if self.sinks is not None:  # one more position, of which only the share is kept from the others
            sinks = self.sinks.reshape(kv_heads, group, 1, 1)
            scores = mint.cat([scores, mint.broadcast_to(sinks, (kv_heads, group, rows, 1))], -1)
        shares = self.fused.softmax(scores.reshape(-1, scores.shape[-1]).contiguous())
        shares = mint.narrow(shares, 1, 0, positions).reshape(kv_heads, group * rows, positions)
        if pages.scales is not None:  # a value that has no share may be NaN
            shares = mint.where(mint.ne(shares, 0.0), shares * pages.scales[1], 0.0)
        sums = self.fused.batch_matmul(shares.contiguous(), pages.values.contiguous(), False)
        sums = mint.permute(sums.reshape(kv_heads, group, rows, size), (2, 0, 1, 3))
        return sums.reshape(rows, features).astype(query.dtype).contiguous()
