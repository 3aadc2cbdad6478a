"""Ranks that have tokens of their own and share what is done for the tokens of all: data parallelism of experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, mint, ops

from vllm_ms_models.distributed.group import Group


@dataclass(frozen=True)
class DataParallel:
    """The ranks of `group` in a step to which rank i brings `counts()[i]` rows, one for each of its tokens.

    A compiled graph, which is for any counts, is told of them by `places`.
    """

    group: Group = field(default_factory=Group)
    counts: Callable[[], Sequence[int]] | None = None

    @property
    def size(self) -> int:
        return self.group.size

    def places(self, counts: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Numbers of rows, int32 and 1-D, by which `gather` (the first two) and `sum_of_own` take what they need.

        Each count is at least 1. Ranks bring as many rows as the one with the most, the last of theirs repeated.
        """
        most, count = max(counts), counts[self.group.rank]
        rows = np.arange(most)
        firsts = np.cumsum(counts) - counts
        brought = np.minimum(rows, count - 1)  # of this rank's rows
        everyone = np.concatenate([rank * most + rows[:n] for rank, n in enumerate(counts)])  # of what all ranks bring
        # Of everyone's rows, what the ranks bring to the sum; and of this rank's part of that, its own.
        spread = np.concatenate([first + np.minimum(rows, n - 1) for first, n in zip(firsts, counts, strict=True)])
        own = rows[:count]
        return tuple(numbers.astype(np.int32) for numbers in (brought, everyone, spread, own))

    def gather(self, x: Tensor, places: Sequence[Tensor] | None = None) -> Tensor:
        """The rows `[counts[rank], n]` of every rank one after another, `[sum of counts, n]`, on every rank."""
        if self.size == 1:
            return x
        if places is not None:
            return ops.gather(self.group.all_gather_rows(ops.gather(x, places[0], 0)), places[1], 0)
        counts = self._counts()
        most = max(counts)
        everyone = self.group.all_gather_rows(_padded(x, most))
        if min(counts) == most:
            return everyone
        return mint.cat([everyone[i * most : i * most + count] for i, count in enumerate(counts)])

    def sum_of_own(self, x: Tensor, places: Sequence[Tensor] | None = None) -> Tensor:
        """Of the sum of every rank's `x` `[sum of counts, n]`, the rows of this rank's tokens `[counts[rank], n]`."""
        if self.size == 1:
            return x
        if places is not None:
            return ops.gather(self.group.reduce_scatter(ops.gather(x, places[2], 0)), places[3], 0)
        counts = self._counts()
        most, own = max(counts), counts[self.group.rank]
        if min(counts) < most:
            x = mint.cat([_padded(part, most) for part in mint.split(x, list(counts))])
        return self.group.reduce_scatter(x)[:own].contiguous()

    def _counts(self) -> Sequence[int]:
        assert self.counts is not None
        return self.counts()


def _padded(x: Tensor, rows: int) -> Tensor:
    """`x` with rows of zeros after its own."""
    missing = rows - x.shape[0]
    return ops.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
