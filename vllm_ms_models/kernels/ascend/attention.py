"""What attention on Ascend needs besides the operators: masks, and a step's sequences. **Not run on hardware.**

The cache of a layer is `[blocks, 2, block_size, kv_heads, head_size]`, block axis first as the interface asks, with
a block's values behind its keys. The operators take keys and values apart, each in one contiguous tensor
`[blocks, block_size, kv_heads, head_size]`. Both are views of the cache as a row of 2 n such halves of blocks: of all
but the last, in which the keys of block b are number 2b, and of all but the first, in which its values are. So one
table of blocks serves both, and nothing is copied; tables and slots are those of the interface with block numbers
doubled. (Were it to turn out on hardware that an operator does not take a view that begins within a tensor, then the
bridge would have to bind keys and values as two halves, `[2, blocks, ...]`, and give up that a block lies together.)
"""

from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend import dtypes
from vllm_ms_models.kernels.interface import PagedSequences

MASK_SIZE = 128  # of the triangle that FlashAttentionScore repeats along the diagonal
MASKED = -10000.0  # added to a score that must not count


def half_blocks(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of `cache`, as views that share numbers of blocks: twice those of the cache."""
    blocks, _, *rest = cache.shape
    halves = cache.view(2 * blocks, *rest)
    return mint.narrow(halves, 0, 0, 2 * blocks - 1), mint.narrow(halves, 0, 1, 2 * blocks - 1)


def doubled_slots(slots: Tensor, block_size: int) -> Tensor:
    """Slots in `half_blocks`; those below 0 stay below 0."""
    slots = slots.astype(ms.int32)
    return slots + mint.floor_divide(slots, Tensor([block_size], ms.int32)) * block_size


def triangle(dtype: ms.Type) -> Tensor:
    """The mask of FlashAttentionScore: what is not 0 masks, a flag in bfloat16, a score's addend in float16."""
    upper = np.triu(np.ones((MASK_SIZE, MASK_SIZE), np.float32), 1)
    return _tensor(upper * (1.0 if dtype == ms.bfloat16 else MASKED), dtype)


@dataclass
class Prepared:
    """The sequences of a step that have tokens, as the operators take them; made once a step, for all layers."""

    sequences: PagedSequences
    query_lens: Tensor  # int32 [n], as the two below
    seq_lens: Tensor
    block_tables: Tensor  # int32 [n, max_blocks], block numbers as they are
    doubled_tables: Tensor
    rows: int  # of the activations that belong to sequences
    decoding: bool  # every sequence has one token
    fresh: bool  # no sequence has context
    positions: np.ndarray  # [rows]
    width: int  # positions of the longest sequence
    masks: dict[ms.Type, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, sequences: PagedSequences) -> "Prepared":
        queries = np.diff(sequences.query_start.asnumpy())
        lengths, tables = sequences.seq_lens.asnumpy(), sequences.block_tables.asnumpy()
        kept = np.flatnonzero(queries > 0)
        queries, lengths, tables = queries[kept], lengths[kept], tables[kept]
        starts = np.cumsum(queries) - queries
        rows = int(queries.sum())
        positions = np.arange(rows) + np.repeat(lengths - queries - starts, queries)
        return cls(
            sequences,
            _int32(queries),
            _int32(lengths),
            _int32(tables),
            _int32(2 * tables.astype(np.int64)),
            rows,
            bool((queries == 1).all()),
            bool((queries == lengths).all()),
            positions,
            int(lengths.max(initial=0)),
        )

    def mask(self, dtype: ms.Type) -> Tensor | None:
        """What PagedAttention adds to scores, `[rows, width]`; a token that is its sequence's last needs none."""
        if self.decoding:
            return None
        if dtype not in self.masks:
            later = np.arange(self.width) > self.positions[:, None]
            self.masks[dtype] = _tensor(np.where(later, np.float32(MASKED), np.float32(0)), dtype)
        return self.masks[dtype]


def _int32(values: np.ndarray) -> Tensor:
    """Entries of tables beyond a sequence's length may be anything, so they may overflow."""
    return Tensor.from_numpy(np.ascontiguousarray(values.astype(np.int32)))


def _tensor(values: np.ndarray, dtype: ms.Type) -> Tensor:
    return dtypes.tensor(values, dtype)
