"""What a module wants from a checkpoint: one `Slot` for each tensor (or part of one) that it reads."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Slot:
    """One checkpoint tensor that a module needs, and what to do with it.

    `name` and `shape` are those on disk (the whole tensor, not a rank's part); `index` selects what this rank reads
    (empty: everything); `load` takes that part as a NumPy array (bfloat16 as `ml_dtypes.bfloat16`), which is only
    valid during the call. `dtypes` are the safetensors dtype names that `load` can take.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[np.ndarray], None]
    index: tuple[slice, ...] = ()
    dtypes: tuple[str, ...] = FLOATS
