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
        """What `gather` takes, numbers of rows, and then `sum_of_own`: int32, 1-D.

        Of this rank's rows, with others to as many as any rank has; of what the ranks bring, row by row of all ranks;
        of everyone's rows, again as many of each rank; and of this rank's among these. No count is 0.
        """
        most, own = max(counts), counts[self.group.rank]
        rows = np.arange(most)
        brought = [rows[:count] * self.size + rank for rank, count in enumerate(counts)]
        firsts = np.cumsum(counts) - counts
        padded = [first + np.minimum(rows, count - 1) for first, count in zip(firsts, counts, strict=True)]
        found = np.minimum(rows, own - 1), np.concatenate(brought), np.concatenate(padded), rows[:own]
        return tuple(numbers.astype(np.int32) for numbers in found)

    def gather(self, x: Tensor, places: Sequence[Tensor] | None = None) -> Tensor:
        """The rows `[counts[rank], n]` of every rank one after another, `[sum of counts, n]`, on every rank."""
        if self.size == 1:
            return x
        if places is not None:
            brought = self.group.all_gather(ops.gather(x, places[0], 0))
            return ops.gather(brought.reshape(-1, x.shape[1]), places[1], 0)
        counts, n = self._counts(), x.shape[1]
        most = max(counts)
        everyone = self.group.all_gather(_padded(x, most).reshape(1, most * n)).reshape(self.size * most, n)
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
