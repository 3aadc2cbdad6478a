"""Attention over the paged cache on Ascend, by the operator that has what is asked for. **Not run on hardware.**

* FlashAttentionScore where no sequence has context and its keys were just written (`write_kv` keeps them until then):
  causal, with the triangle for a mask, or without a mask in both directions; and if no sequence is longer than the
  window. (Its band needs `sparse_mode` 4, which its documentation does not allow for sequences of several lengths.)
* PagedAttention otherwise, with a mask unless every row is its sequence's last and sees all of it. With a window it
  reads only pages that a row still sees.
* `plain_attention` for soft caps, sinks, caches of int8 and heads that are not multiples of 16.
"""

from typing import Any

import mindspore as ms
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend import dense, dtypes
from vllm_ms_models.kernels.ascend.caches import HEAD_MULTIPLE, Writer, half_blocks, head_size_of, is_fused
from vllm_ms_models.kernels.ascend.plain_attention import PlainAttention
from vllm_ms_models.kernels.ascend.prepared import Prepared, triangle
from vllm_ms_models.kernels.paged_sequences import PagedSequences

# What FlashAttentionScore's documentation allows: features of a head, heads, sequences.
FLASH_SIZE, FLASH_HEADS, FLASH_SEQUENCES = 512, 256, 2048


class Attention:
    """What `AscendKernels` does with sequences, by calls of `fused` (the functions of `operators`)."""

    def __init__(self, fused: Any, products: dense.Dense) -> None:
        self._ops = fused
        self._dense = products
        self._writer = Writer(fused)
        self._prepared: Prepared | None = None
        self._triangles: dict[ms.Type, Tensor] = {}
        self._written: tuple[Tensor, Tensor, Tensor] | None = None  # a cache and what was last written to it

    def write(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        """`Kernels.write_kv`."""
        self._writer.write(key, value, cache, slots)
        self._written = cache, key, value

    def attend(
        self,
        query: Tensor,
        cache: Tensor,
        sequences: PagedSequences,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        causal: bool,
        sinks: Tensor | None,
    ) -> Tensor:
        """`Kernels.paged_attention`."""
        dtypes.check(query)
        heads = query.shape[1] // head_size_of(cache)
        if sinks is not None and sinks.shape != (heads,):
            raise ValueError(f"{heads} heads have sinks {sinks.shape}")
        written, self._written = self._written, None
        step = self.prepare(sequences)
        if step.rows == 0:
            return mint.zeros(query.shape, dtype=query.dtype)
        rows = query[: step.rows].contiguous()
        window = step.limit(window)
        if soft_cap is not None or sinks is not None or not is_fused(cache):
            sinks = None if sinks is None else self._dense.constant(sinks, ms.float32)
            plain = PlainAttention(self._ops, float(scale), window, soft_cap, causal, sinks)
            return with_rows(plain.attend(rows, cache, step), query.shape[0])
        # Keys of as many rows, just written to this cache, are those of the same rows.
        just_written = written is not None and written[0] is cache and written[1].shape[0] == query.shape[0]
        if just_written and window is None and self.takes_flash(step, heads, head_size_of(cache)):
            assert written is not None
            key, value = (x[: step.rows].contiguous() for x in written[1:])
            result = self.flash(rows, key, value, step, heads, scale, causal)
        else:
            keys, values = half_blocks(cache)
            result = self.paged(rows, keys, values, step, heads, scale, window, causal, halves=True)
        return with_rows(result, query.shape[0])

    @staticmethod
    def takes_flash(step: Prepared, heads: int, size: int) -> bool:
        fits = size % HEAD_MULTIPLE == 0 and size <= FLASH_SIZE and heads <= FLASH_HEADS
        return step.fresh and fits and len(step.queries) <= FLASH_SEQUENCES

    def flash(
        self, query: Tensor, key: Tensor, value: Tensor, step: Prepared, heads: int, scale: float, causal: bool = True
    ) -> Tensor:
        """Of sequences without context, whose positions are the rows of all three."""
        mask = self._triangle(query.dtype) if causal else None
        return self._ops.flash_attention(query, key, value, mask, step.query_lens, step.seq_lens, heads, float(scale))

    def paged(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        step: Prepared,
        heads: int,
        scale: float,
        window: int | None = None,
        causal: bool = True,
        halves: bool = False,
        mla_v_dim: int = 0,
    ) -> Tensor:
        """Over caches `[blocks, block_size, kv_heads, size]`; `halves`: those of `half_blocks`."""
        pages = step.pages(window, keys.shape[1], halves)
        mask = step.mask(pages, window, causal, query.dtype)
        query_lens = None if mask is None else step.query_lens
        options = heads, keys.shape[2], float(scale), mla_v_dim
        return self._ops.paged_attention(query, keys, values, pages.tables, pages.lengths, mask, query_lens, *options)

    def prepare(self, sequences: PagedSequences) -> Prepared:
        """All layers of a step pass the same object, so what is made of it is made once."""
        if self._prepared is None or self._prepared.sequences is not sequences:
            self._prepared = Prepared.of(sequences, self._ops)
        return self._prepared

    def _triangle(self, dtype: ms.Type) -> Tensor:
        if dtype not in self._triangles:
            self._triangles[dtype] = self._ops.to_device(triangle(dtype))
        return self._triangles[dtype]


def with_rows(x: Tensor, rows: int) -> Tensor:
    """`x` with as many rows; those that belong to no sequence are 0."""
    missing = rows - x.shape[0]
    return mint.cat([x, mint.zeros((missing, x.shape[1]), dtype=x.dtype)]) if missing else x
