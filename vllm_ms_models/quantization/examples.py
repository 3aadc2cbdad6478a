"""Arrays for models without weights (`--load-format dummy`), one maker for each kind of quantized tensor."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

Example = Callable[[tuple[int, ...]], np.ndarray]

WEIGHT = 0.03  # about the standard deviation that example weights have, as those of float models


def noise(dtype: Any) -> Example:
    """Random bits of an integer dtype; the same ones each time."""

    def make(shape: tuple[int, ...]) -> np.ndarray:
        bits = np.random.default_rng(0).integers(0, 256, 1_000_003, np.uint8)
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return np.resize(bits, count).view(dtype).reshape(shape)

    return make


def float8(shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(0).uniform(-400, 400, 1_000_003).astype(ml_dtypes.float8_e4m3fn)
    return np.resize(values, shape)


def constant(value: float, dtype: Any = np.float32) -> Example:
    return lambda shape: np.full(shape, value, dtype)
