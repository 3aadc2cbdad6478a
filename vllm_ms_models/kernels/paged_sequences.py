"""Where a batch's sequences are."""

from dataclasses import dataclass

import numpy as np
from mindspore import Tensor


@dataclass(frozen=True)
class PagedSequences:
    """Where the sequences of a batch lie in the rows of an activation and in the paged KV cache (all int32).

    Sequence i owns activation rows `query_start[i]:query_start[i+1]`, which are its last positions; with them it is
    `seq_lens[i]` tokens long. Its position p lies in cache block `block_tables[i, p // block_size]` at offset
    `p % block_size`. Entries of `block_tables` beyond a sequence's length are arbitrary.
    """

    query_start: Tensor  # [sequences + 1]
    seq_lens: Tensor  # [sequences]
    block_tables: Tensor  # [sequences, max_blocks]
    max_query_len: int
    max_seq_len: int

    @property
    def num_sequences(self) -> int:
        return self.seq_lens.shape[0]

    def part(self, begin: int, end: int) -> "PagedSequences":
        """Sequences `begin` up to `end`; their rows are counted from the first one's."""
        starts, lengths = self.query_start.asnumpy()[begin : end + 1], self.seq_lens.asnumpy()[begin:end]
        tables = self.block_tables.asnumpy()[begin:end]
        start, length, blocks = (
            Tensor.from_numpy(np.ascontiguousarray(array)) for array in (starts - starts[0], lengths, tables)
        )
        return PagedSequences(start, length, blocks, int(np.diff(starts).max()), int(lengths.max()))
