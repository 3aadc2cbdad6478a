"""Attention within sequences that are all in the batch: encoders of text and of images, which keep no KV cache.

It runs on the kernels of the paged cache: keys and values are copied to pages that all layers of a step share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models import kernels
from vllm_ms_models.kernels import PagedSequences
from vllm_ms_models.layers.layer import Layer

BLOCK_SIZE = 32  # positions of a page; what is left of a sequence's last one is wasted


@dataclass(frozen=True)
class RaggedSequences:
    """Where sequences of some lengths lie, one after another, in rows `[tokens, ...]`, and their pages."""

    sequences: PagedSequences
    slots: Tensor  # int64 [tokens]
    blocks: int
    pages: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "RaggedSequences":
        """`lengths` are those of the sequences, at least one, none of them 0."""
        sizes = np.asarray(lengths, np.int32)
        starts = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
        blocks = -(-sizes // BLOCK_SIZE)
        firsts = (np.cumsum(blocks) - blocks).astype(np.int32)
        tables = firsts[:, None] + np.arange(blocks.max(), dtype=np.int32)  # beyond a sequence's end: arbitrary
        tables = np.minimum(tables, blocks.sum() - 1).astype(np.int32)
        slots = np.arange(starts[-1], dtype=np.int64) + np.repeat(firsts * BLOCK_SIZE - starts[:-1], sizes)
        starts, sizes, tables = (Tensor.from_numpy(array) for array in (starts, sizes, tables))
        longest = int(np.max(lengths))
        sequences = PagedSequences(starts, sizes, tables, longest, longest)
        return cls(sequences, kernels.get().place(Tensor.from_numpy(slots)), int(blocks.sum()))


class RaggedAttention(Layer):
    """Scaled dot-product attention; every token attends to its whole sequence, or up to itself if `causal`."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_size: int, scale: float | None = None, causal: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = head_size**-0.5 if scale is None else scale
        self.causal = causal
        self.kernels = kernels.get()

    def construct(self, query: Tensor, key: Tensor, value: Tensor, ragged: RaggedSequences) -> Tensor:
        """`[tokens, heads * head_size]` queries, `[tokens, kv_heads * head_size]` keys and values -> as queries."""
        shape = self.kernels.cache_shape(ragged.blocks, BLOCK_SIZE, self.num_kv_heads, self.head_size)
        pages = ragged.pages.get((shape, key.dtype))
        if pages is None:
            pages = ragged.pages[shape, key.dtype] = mint.empty(shape, dtype=key.dtype)
        self.kernels.write_kv(key, value, pages, ragged.slots)
        return self.kernels.paged_attention(query, pages, ragged.sequences, self.scale, causal=self.causal)
