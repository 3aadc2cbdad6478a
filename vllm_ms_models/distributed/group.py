"""The ranks that share one model's layers."""

from dataclasses import dataclass

from mindspore import Tensor


@dataclass(frozen=True)
class Group:
    """This process's place among `size` ranks. Collectives come with the parallel executors; one rank needs none."""

    rank: int = 0
    size: int = 1

    def share(self, total: int, what: str) -> int:
        """`total / size`; ValueError when it does not divide."""
        if total % self.size:
            raise ValueError(
                f"{what} ({total}) is not divisible by the tensor parallel size {self.size}; "
                f"choose a --tensor-parallel-size that divides it."
            )
        return total // self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, on every rank."""
        if self.size == 1:
            return x
        raise NotImplementedError("Collectives over several ranks come with the parallel executors.")

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's `x` side by side along the last axis, on every rank."""
        if self.size == 1:
            return x
        raise NotImplementedError("Collectives over several ranks come with the parallel executors.")
