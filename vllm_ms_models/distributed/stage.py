"""A stage of a pipeline: the processes that have some of a model's layers, one after another."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """This process's place among `size` stages, and its layers: numbers of the whole model's (None: all of them)."""

    rank: int = 0
    size: int = 1
    layers: range | None = None

    @property
    def is_first(self) -> bool:
        """Whether it takes tokens; the others take what the stage before hands on."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the head; the others hand on what their last layer gives."""
        return self.rank == self.size - 1
