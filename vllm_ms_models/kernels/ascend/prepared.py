"""A step's sequences as the attention operators take them, and masks. **Not run on hardware.**"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models.kernels.ascend import dtypes
from vllm_ms_models.kernels.interface import PagedSequences

MASK_SIZE = 128  # of the triangle that FlashAttentionScore repeats along the diagonal
MASKED = -10000.0  # added to a score that must not count


def triangle(dtype: ms.Type) -> Tensor:
    """The mask of FlashAttentionScore: what is not 0 masks, a flag in bfloat16, a score's addend in float16."""
    upper = np.triu(np.ones((MASK_SIZE, MASK_SIZE), np.float32), 1)
    return _tensor(upper * (1.0 if dtype == ms.bfloat16 else MASKED), dtype)


@dataclass(frozen=True)
class Span:
    """Pages that PagedAttention reads: those of whole sequences, or what rows with a window still see of them."""

    tables: Tensor  # int32 [n, blocks], numbered as in `caches.half_blocks`
    lengths: Tensor  # int32 [n], counted from the first page
    mask: Tensor | None  # [rows, longest]; None where every row is its sequence's last and sees all


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

    def span(self, dtype: ms.Type, window: int | None, causal: bool, block_size: int, halves: bool) -> Span:
        """What PagedAttention is told of the pages of keys; `halves`: numbers of blocks are doubled."""
        window = self.limit(window)
        key = "span", dtype, window, causal, block_size, halves
        return self.once(key, lambda: self._span(dtype, window, causal, block_size, halves))

    def _span(self, dtype: ms.Type, window: int | None, causal: bool, block_size: int, halves: bool) -> Span:
        tables = self.tables.astype(np.int64) * (2 if halves else 1)
        if window is None:
            mask = None if self.decoding else self._mask(self.positions, self.width, None, causal, dtype)
            return Span(self.fused.to_device(_int32(tables)), self.seq_lens, mask)
        # Pages that lie before every row's window are left out. (vLLM may have given them to others by now.)
        skipped = np.maximum(self.lengths - self.queries - window + 1, 0) // block_size
        lengths = self.lengths - skipped * block_size
        columns = skipped[:, None] + np.arange(-(-int(lengths.max()) // block_size))
        tables = np.take_along_axis(tables, np.minimum(columns, tables.shape[1] - 1), 1)
        positions = self.positions - np.repeat(skipped * block_size, self.queries)
        mask = self._mask(positions, int(lengths.max()), window, causal, dtype)
        return Span(self.fused.to_device(_int32(tables)), self.fused.to_device(_int32(lengths)), mask)

    def _mask(self, positions: np.ndarray, width: int, window: int | None, causal: bool, dtype: ms.Type) -> Tensor:
        """What PagedAttention adds to the scores of rows at `positions`, `[rows, width]`."""
        keys, places = np.arange(width), positions[:, None]
        hidden = np.zeros((len(positions), width), np.bool_)
        if causal:
            hidden |= keys > places
        if window is not None:
            hidden |= keys <= places - window
        return self.fused.to_device(_tensor(np.where(hidden, np.float32(MASKED), np.float32(0)), dtype))

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
