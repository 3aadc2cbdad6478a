"""The batch of one step, as models see it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import Tensor

from vllm_ms_models.kernels import PagedSequences
from vllm_ms_models.layers.ragged_attention import RaggedSequences

Split = tuple[PagedSequences | None, PagedSequences | None, int]


@dataclass(frozen=True)
class CacheView:
    """How one group of layers finds the batch in its KV cache."""

    sequences: PagedSequences
    slots: Tensor  # int64 [tokens]: where each token's key and value are stored
    _splits: dict[int, Split] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getitem__(self, name: str) -> Any:
        """The field of that name: in a compiled graph (bridge/graph.py) a dictionary is in this one's place."""
        return getattr(self, name)

    def split(self, tokens: int) -> Split:
        """Sequences before the first with `tokens` rows or more, the others, and where the rows of those begin.

        None for either if it would be empty. Worked out once a step, whichever number of layers asks.
        """
        if tokens not in self._splits:
            self._splits[tokens] = self._split(tokens)
        return self._splits[tokens]

    def _split(self, tokens: int) -> Split:
        sequences = self.sequences
        if sequences.max_query_len < tokens:
            return sequences, None, 0
        starts = sequences.query_start.asnumpy()
        first = int(np.argmax(np.diff(starts) >= tokens))
        if first == 0:
            return None, sequences, 0
        rest = sequences.part(first, sequences.num_sequences)
        return sequences.part(0, first), rest, int(starts[first])


@dataclass(frozen=True)
class Adaptation:
    """The adapters (LoRA) of a batch: their numbers, and which of these each token has (int32 `[tokens]`, -1: none).

    A number is what the linears of the model keep an adapter's matrices under (`Linear.adapters`).
    """

    numbers: tuple[int, ...]
    rows: Tensor


@dataclass(frozen=True)
class Batch:
    """All that the layers need besides hidden states; an argument of every `construct`.

    `positions` is int64 `[tokens]`, or `[3, tokens]` (time, row, column), on the host, if the rotary embedding has
    sections. `caches` maps an attention layer's name to its group's view: layers with different cache needs (full,
    sliding window) have different block tables. `adaptation` is None if no token has an adapter. Encoders, which keep
    no cache, find their sequences in `ragged`, and the types of the tokens (int32 `[tokens]`; None: all 0) in
    `token_types`. `ranks` are the step's `DataParallel.places`, of which compiled graphs are told.
    """

    positions: Tensor
    caches: Mapping[str, CacheView]
    adaptation: Adaptation | None = None
    ragged: RaggedSequences | None = None
    token_types: Tensor | None = None
    ranks: tuple[Tensor, ...] | None = None

    def __getitem__(self, name: str) -> Any:
        """As `CacheView`'s."""
        return getattr(self, name)
