"""Products with weights of small integers, computed with int64 and float64 NumPy; and weights to try them on.

Rounding activations to int8 is float32 arithmetic of single, correctly rounded operations, so it is reproduced bit for
bit. What follows a sum of integers is off by at most u = 2^-24 relative to it in each of: its conversion to float32,
the product of the scales, the product with the sum; then the sum with the bias by u of itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.kernels.references import TINY, UNIT, Bounded
from vllm_ms_models.kernels import Integers, Kernels, Weight

DYNAMIC, STATIC = Integers(8, 0, "dynamic"), Integers(8, 0, "static")


@dataclass(frozen=True)
class Matrix:
    """What is loaded into a weight: `values`, `scales`, `zeros`, `addends` as in `Kernels.load_scales`.

    `inputs` has scale and offset of the static input of each part.
    """

    integers: Integers
    sizes: Sequence[int]
    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    addends: np.ndarray
    inputs: Sequence[tuple[float, int]]

    def load(self, kernels: Kernels) -> Weight:
        weight = kernels.new_integer_weight(self.sizes, self.values.shape[1], self.integers)
        cuts = np.cumsum(self.sizes)[:-1]
        arrays = (np.split(array, cuts) for array in (self.values, self.scales, self.zeros, self.addends))
        for part, (values, scales, zeros, addends) in enumerate(zip(*arrays, strict=True)):
            kernels.load_integers(weight, part, 0, values)
            floats = self.integers.activations == "float"
            kernels.load_scales(weight, part, 0, scales, zeros if zeros.any() else None, None if floats else addends)
            if self.integers.activations == "static":
                kernels.set_input(weight, part, *self.inputs[part])
        return weight


def matrix(
    rng: np.random.Generator,
    integers: Integers,
    sizes: Sequence[int],
    width: int,
    zeros: bool = False,
    addends: bool = False,
    same_input: bool = True,
) -> Matrix:
    """Random values over the whole range, scales of several magnitudes."""
    rows, groups = sum(sizes), integers.groups(width)
    half = 1 << (integers.bits - 1)
    unit = 0.02 if integers.activations == "static" else 1.0  # there scales are those of products
    inputs = [(float(np.float32(rng.uniform(0.005, 0.05))), int(rng.integers(-128, 128))) for _ in sizes]
    return Matrix(
        integers,
        sizes,
        rng.integers(-half, half, (rows, width), np.int8),
        (rng.uniform(0.1, 1.0, (rows, groups)) * 2.0 ** rng.integers(-6, 1, (rows, groups)) * unit / half).astype(
            np.float32
        ),
        (rng.integers(-half, half, (rows, groups)) * zeros).astype(np.int8),
        (rng.integers(-100_000, 100_000, rows) * addends).astype(np.int32),
        inputs[:1] * len(sizes) if same_input else inputs,
    )


def round_by_token(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as int64 and their scales `[tokens, 1]`; the scale of a row that is not finite is NaN."""
    x = x.astype(np.float32)
    finite = np.isfinite(x).all(1, keepdims=True)
    x = np.where(finite, x, np.float32(0))
    largest = np.abs(x).max(1, keepdims=True, initial=0)
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.float32(127) / largest
    rounded = np.rint(x * np.where(np.isfinite(factor), factor, np.float32(0)))
    return rounded.astype(np.int64), np.where(finite, largest / np.float32(127), np.nan).astype(np.float64)


def round_by_input(x: np.ndarray, scale: float, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as int64, and 1 or NaN for each."""
    x = x.astype(np.float32)
    finite = np.isfinite(x).all(1, keepdims=True)
    with np.errstate(over="ignore"):
        rounded = np.rint(np.where(finite, x, np.float32(0)) * (np.float32(1) / np.float32(scale))) + np.float32(offset)
    return np.clip(rounded, -128, 127).astype(np.int64), np.where(finite, 1.0, np.nan)


def linear(x: np.ndarray, weight: Matrix, bias: np.ndarray | None = None) -> Bounded:
    """`y` of `Integers`, parts side by side."""
    bias = np.zeros(len(weight.values)) if bias is None else bias
    if weight.integers.activations == "float":
        return _linear_floats(x, weight, bias)
    parts = []
    first = 0
    for size, (scale, offset) in zip(weight.sizes, weight.inputs, strict=True):
        rows = slice(first, first + size)
        first += size
        dynamic = weight.integers.activations == "dynamic"
        q, scales = round_by_token(x) if dynamic else round_by_input(x, scale, offset)
        centred = weight.values[rows].astype(np.int64) - weight.zeros[rows].astype(np.int64)
        sums = q @ centred.T + weight.addends[rows]
        parts.append(sums * (scales * weight.scales[rows, 0].astype(np.float64)))
    products = np.concatenate(parts, 1) if parts else np.zeros((len(x), 0))
    values = products + bias
    return values, 3.1 * UNIT * np.abs(products) + UNIT * np.abs(values)


def _linear_floats(x: np.ndarray, weight: Matrix, bias: np.ndarray) -> Bounded:
    """Any order of summation, and zero points by the sum of a group's activations.

    In a group of n inputs, products and their sum are off by (n + 1) u, products with the zero point likewise, and
    their difference and the scale add 2 u; the sum over g groups and the bias adds (g + 1) u.
    """
    width, size = weight.values.shape[1], weight.integers.group_size or max(1, weight.values.shape[1])
    scales, zeros = (np.repeat(a.astype(np.float64), size, 1)[:, :width] for a in (weight.scales, weight.zeros))
    values = weight.values.astype(np.float64)
    exact = x @ ((values - zeros) * scales).T + bias
    magnitude = np.abs(x) @ ((np.abs(values) + np.abs(zeros)) * np.abs(scales)).T + np.abs(bias)
    return exact, (min(size, width) + weight.scales.shape[1] + 5) * UNIT * magnitude + TINY


def poison(x: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A copy of `x` in which some rows have a value that is not finite, and which rows."""
    x, bad = x.copy(), rng.random(len(x)) < 0.5
    for row in np.flatnonzero(bad):
        x[row, rng.integers(x.shape[1])] = rng.choice([np.nan, np.inf, -np.inf])
    return x, bad


def exact_inputs(rng: np.random.Generator, tokens: int, width: int) -> np.ndarray:
    """Rows that dynamic rounding leaves as they are: integers, 127 among them, times a power of two."""
    q = rng.integers(-127, 128, (tokens, width)).astype(np.float64)
    q[np.arange(tokens), rng.integers(0, width, tokens)] = 127
    return q * 2.0 ** rng.integers(-6, 7, (tokens, 1))
