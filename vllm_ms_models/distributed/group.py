"""The ranks that share one model's layers, and what layers ask of them."""

from dataclasses import dataclass

from mindspore import Tensor


@dataclass(frozen=True)
class Group:
    """This process's place among `size` ranks.

    A collective is called by all ranks, in the same order and with equal shapes. This class does them for one rank,
    where they change nothing; for several ranks, a subclass overrides them (shared_memory.py: those of one host;
    bridge/ranks.py: vLLM's process groups).
    All results are the same, to the bit, on every rank that gets them. `x` may be changed: only the result counts.
    """

    rank: int = 0
    size: int = 1

    def share(self, total: int, what: str) -> int:
        """`total / size`; ValueError when it does not divide."""
        if total % self.size:
            raise ValueError(
                f"{what} ({total}) is not divisible by the number of ranks that share it, {self.size}; "
                f"choose a --tensor-parallel-size that divides it."
            )
        return total // self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, on every rank."""
        return self._alone(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's `x` side by side along the last axis, on every rank."""
        return self._alone(x)

    def all_gather_rows(self, x: Tensor) -> Tensor:
        """Every rank's `x` `[n, width]` one after another, `[size * n, width]`, on every rank."""
        rows, width = x.shape
        return self.all_gather(x.reshape(1, rows * width)).reshape(self.size * rows, width)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Of the sum of every rank's `x` `[size * n, ...]`, this rank's rows: `[n, ...]`."""
        return self._alone(x)

    def all_to_all(self, x: Tensor) -> Tensor:
        """`x` is `[size * n, ...]`: its i-th n rows go to rank i; the result has those that come from rank i there."""
        return self._alone(x)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """The `x` of rank `source`, on every rank."""
        return self._alone(x)

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        self._alone(None)

    def _alone(self, x: Tensor | None) -> Tensor | None:
        if self.size > 1:
            raise NotImplementedError(f"A {type(self).__name__} of {self.size} ranks has no way from one to another.")
        return x
