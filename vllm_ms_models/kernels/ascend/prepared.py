"""A step's sequences as the attention operators take them, and masks. **Not run on hardware.**"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend import dtypes
from vllm_ms_models.kernels.paged_sequences import PagedSequences

MASK_SIZE = 128  # of the triangle that FlashAttentionScore repeats along the diagonal
MASKED = -10000.0  # added to a score that must not count


def triangle(dtype: ms.Type) -> Tensor:
    """The mask of FlashAttentionScore: what is not 0 masks, a flag in bfloat16, a score's addend in float16."""
    upper = np.triu(np.ones((MASK_SIZE, MASK_SIZE), np.float32), 1)
    return _tensor(upper * (1.0 if dtype == ms.bfloat16 else MASKED), dtype)


@dataclass(frozen=True)
class Pages:
    """What PagedAttention reads: the pages of whole sequences, or what rows with a window still see of them."""

    tables: Tensor  # int32 [n, blocks], numbered as in `caches.half_blocks`
    lengths: Tensor  # int32 [n], counted from the first page
    # Unless every row is its sequence's last and sees all: for its mask, where rows and all positions are.
    places: Tensor | None = None  # int32 [rows, 1], counted from the first page
    columns: Tensor | None = None  # int32 [longest]


def mask(places: Tensor, columns: Tensor, window: int | None, causal: bool, dtype: ms.Type) -> Tensor:
    """What PagedAttention adds to scores, `[rows, longest]`; of `Pages`."""
    if window is None:
        hidden = mint.gt(columns, places) if causal else mint.lt(columns + places, 0)  # the last: nowhere
    else:
        hidden = mint.le(columns, places - window)
        hidden = mint.logical_or(hidden, mint.gt(columns, places)) if causal else hidden
    return hidden.astype(dtype) * MASKED


@dataclass
class Prepared:
    """The sequences of a step that have tokens; made once a step, for all layers.

    Arrays are the host's, tensors the device's. What only some layers ask for is made when the first one does.
    """

    sequences: PagedSequences
    fused: Any  # the functions of `operators`
    queries: np.ndarray  # [n]: rows of each sequence
    lengths: np.ndarray  # [n]
    tables: np.ndarray  # [n, max_blocks]: block numbers as they are
    positions: np.ndarray  # [rows]
    query_lens: Tensor  # int32 [n], as the one below
    seq_lens: Tensor
    block_tables: Tensor  # int32 [n, max_blocks]
    made: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, sequences: PagedSequences, fused: Any) -> "Prepared":
        queries = np.diff(sequences.query_start.asnumpy())
        lengths, tables = sequences.seq_lens.asnumpy(), sequences.block_tables.asnumpy()
        kept = np.flatnonzero(queries > 0)
        queries, lengths, tables = queries[kept], lengths[kept], tables[kept]
        starts = np.cumsum(queries) - queries
        positions = np.arange(queries.sum()) + np.repeat(lengths - queries - starts, queries)
        on_device = [fused.to_device(_int32(x)) for x in (queries, lengths, tables)]
        return cls(sequences, fused, queries, lengths, tables, positions, *on_device)

    @property
    def rows(self) -> int:
        """Of the activations: those that belong to sequences, which come first."""
        return len(self.positions)

    @property
    def width(self) -> int:
        """Positions of the longest sequence."""
        return int(self.lengths.max(initial=0))

    @property
    def decoding(self) -> bool:
        """Whether every sequence has one row."""
        return bool((self.queries == 1).all())

    @property
    def fresh(self) -> bool:
        """Whether no sequence has context: all its positions are among the rows."""
        return bool((self.queries == self.lengths).all())

    def limit(self, window: int | None) -> int | None:
        """`window`, unless no sequence is longer."""
        return None if window is None or window >= self.width else window

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes, made for the first layer that asks for `key`."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def pages(self, window: int | None, block_size: int, halves: bool) -> Pages:
        """For layers with that window; `halves`: numbers of blocks are doubled."""
        window = self.limit(window)
        return self.once(("pages", window, block_size, halves), lambda: self._pages(window, block_size, halves))

    def _pages(self, window: int | None, block_size: int, halves: bool) -> Pages:
        tables = self.tables.astype(np.int64) * (2 if halves else 1)
        if window is None:
            of_mask = () if self.decoding else self.places()
            return Pages(self.fused.to_device(_int32(tables)), self.seq_lens, *of_mask)
        # Pages that lie before every row's window are left out. (vLLM may have given them to others by now.)
        skipped = np.maximum(self.lengths - self.queries - window + 1, 0) // block_size
        lengths = self.lengths - skipped * block_size
        columns = skipped[:, None] + np.arange(-(-int(lengths.max()) // block_size))
        tables = np.take_along_axis(tables, np.minimum(columns, tables.shape[1] - 1), 1)
        places = self.positions - np.repeat(skipped * block_size, self.queries)
        arrays = tables, lengths, places[:, None], np.arange(int(lengths.max()))
        return Pages(*(self.fused.to_device(_int32(each)) for each in arrays))

    def mask(self, pages: Pages, window: int | None, causal: bool, dtype: ms.Type) -> Tensor | None:
        """Of `pages` for that window; None where there is nothing to mask."""
        places, columns = pages.places, pages.columns
        if places is None or columns is None:
            return None
        window = self.limit(window)
        return self.once(
            ("mask", id(pages), window, causal, dtype), lambda: mask(places, columns, window, causal, dtype)
        )

    def slots(self, block_size: int) -> Tensor:
        """Where in the cache the rows themselves are, int32 `[rows]`: block * block_size + offset."""

        def make() -> Tensor:
            blocks = self.tables[np.repeat(np.arange(len(self.queries)), self.queries), self.positions // block_size]
            return self.fused.to_device(_int32(blocks * block_size + self.positions % block_size))

        return self.once(("slots", block_size), make)

    def places(self) -> tuple[Tensor, Tensor]:
        """Positions of the rows, int32 `[rows, 1]`, and those there are, int32 `[width]`."""

        def make() -> tuple[Tensor, ...]:
            return tuple(self.fused.to_device(_int32(x)) for x in (self.positions[:, None], np.arange(self.width)))

        return self.once("places", make)


def _int32(values: np.ndarray) -> Tensor:
    """Entries of tables beyond a sequence's length may be anything, so they may overflow."""
    return Tensor.from_numpy(np.ascontiguousarray(values.astype(np.int32)))


def _tensor(values: np.ndarray, dtype: ms.Type) -> Tensor:
    return dtypes.tensor(values, dtype)
