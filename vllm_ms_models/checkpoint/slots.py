"""What a module wants from a checkpoint: one `Slot` for each tensor (or part of one) that it reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

FLOATS = ("F32", "BF16", "F16")

PIECE = 8 << 20
"""Values of a matrix that are read at once: the buffer for them stays small, and mostly in the CPU's caches."""


@dataclass(frozen=True)
class Slot:
    """One checkpoint tensor that a module needs, and what to do with it.

    `name` and `shape` are those on disk (the whole tensor, not a rank's part); `index` selects what this rank reads
    (empty: everything); `load` takes that part as a NumPy array (bfloat16 as `ml_dtypes.bfloat16`), which is only
    valid during the call. `dtypes` are the safetensors dtype names that `load` can take.

    Quantized weights need more: `shapes` are others that the tensor may have instead; an `optional` tensor may be
    absent; `early` ones are read before all others (scales, which say how weights are to be taken); `itemsize` is what
    an element takes in the model, in bytes (None: the size of the model's dtype); `example` makes up an array of the
    part's shape for models without weights (None: small random floats).
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[np.ndarray], None]
    index: tuple[slice, ...] = ()
    dtypes: tuple[str, ...] = FLOATS
    shapes: tuple[tuple[int, ...], ...] = ()
    optional: bool = False
    early: bool = False
    itemsize: int | None = None
    example: Callable[[tuple[int, ...]], np.ndarray] | None = None

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part that this rank reads."""
        taken = [len(range(*part.indices(size))) for part, size in zip(self.index, self.shape, strict=False)]
        return (*taken, *self.shape[len(taken) :])


def pieces(rows: slice, columns: int) -> Iterator[tuple[int, slice]]:
    """`rows` of a matrix with so many columns in pieces of about PIECE values: (first row within `rows`, rows).

    At least one, be it empty, so that the tensor is missed if it is not in the checkpoint.
    """
    step = max(16, PIECE // max(columns, 1) // 16 * 16)  # kernels pack rows by 16
    for first in range(rows.start, max(rows.stop, rows.start + 1), step):
        yield first - rows.start, slice(first, min(first + step, rows.stop))
