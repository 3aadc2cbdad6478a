"""What a check of an operator is, and what the checks share. **Not run on hardware.**

A case gives its operator's results, each with the value that it stands for and the magnitude that its roundings are
relative to: for a sum, that of the sum of its terms' magnitudes. NumPy computes in float64, from the inputs as rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Tensor, mint

UNITS = {ms.float16: 2.0**-11, ms.bfloat16: 2.0**-8, ms.float32: 2.0**-24}  # the largest relative error of a rounding
NUMPY = {ms.float16: np.dtype(np.float16), ms.bfloat16: np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Result:
    """A result and what it stands for; `slack` may come to its roundings, absolutely (0.5: rounded to an integer)."""

    got: Tensor
    want: np.ndarray
    terms: np.ndarray | None = None  # None: |want|
    slack: float = 0.0
    unit: float | None = None  # None: that of the dtype of `got`

    def roundings(self) -> float:
        """How many roundings would explain the largest difference; infinite for a wrong shape or NaN."""
        got = self.got.astype(ms.float32).asnumpy().astype(np.float64)
        if got.shape != self.want.shape or not np.isfinite(got).all():
            return float("inf")
        unit = UNITS.get(self.got.dtype, 0.0) if self.unit is None else self.unit
        terms = np.abs(self.want) if self.terms is None else self.terms
        off = np.maximum(np.abs(got - self.want) - self.slack, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.where(off == 0, 0, off / (unit * terms)).max(initial=0))


@dataclass(frozen=True)
class Case:
    """`run(operators, dtype, rng)` calls `operator` with floats of that dtype; `variant` says what is special."""

    operator: str
    variant: str
    run: Callable[[Any, Any, np.random.Generator], list[Result]]
    on_cpu: bool  # False: a CPU has the operator, but it does not do this

    @property
    def name(self) -> str:
        return f"{self.operator} ({self.variant})" if self.variant else self.operator


CASES: list[Case] = []


def case(
    operator: str, variant: str = "", on_cpu: bool = True
) -> Callable[[Callable[..., list[Result]]], Callable[..., list[Result]]]:
    def register(run: Callable[..., list[Result]]) -> Callable[..., list[Result]]:
        CASES.append(Case(operator, variant, run, on_cpu))
        return run

    return register


def floats(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> tuple[Tensor, np.ndarray]:
    """Normally distributed numbers, as a tensor and in float64."""
    values = rng.normal(size=shape).astype(NUMPY[dtype])
    return Tensor.from_numpy(values), values.astype(np.float64)


def on_device(values: np.ndarray, dtype: Any) -> Tensor:
    """A tensor that is written to in place, or of which views are taken: allocated where the operators run."""
    target = mint.zeros(values.shape, dtype=dtype)
    target.copy_(Tensor.from_numpy(values.astype(NUMPY[dtype])))
    return target


def int32(values: Any) -> Tensor:
    return Tensor(np.array(values, np.int32))
