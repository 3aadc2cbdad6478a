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
from mindspore import Tensor

UNITS = {ms.float16: 2.0**-11, ms.bfloat16: 2.0**-8, ms.float32: 2.0**-24}  # the largest relative error of a rounding
NUMPY = {
    ms.float16: np.dtype(np.float16),
    ms.bfloat16: np.dtype(ml_dtypes.bfloat16),
    ms.float32: np.dtype(np.float32),
    ms.int8: np.dtype(np.int8),
}
APPROXIMATED = 2.0**-18  # of exponentials in float32: those of MindSpore on a CPU are off by as much
HALVES = (ms.float16, ms.bfloat16)


@dataclass(frozen=True)
class Given:
    """What a case runs on: `ops` has the functions of `operators`."""

    ops: Any
    dtype: Any
    rng: np.random.Generator

    def place(self, values: np.ndarray) -> Tensor:
        """On the device, in the array's dtype."""
        return self.ops.to_device(Tensor.from_numpy(np.ascontiguousarray(values)))

    def rounded(self, values: np.ndarray) -> np.ndarray:
        return values.astype(NUMPY[self.dtype])

    def floats(self, *shape: int) -> tuple[Tensor, np.ndarray]:
        """Normally distributed numbers, as a tensor and in float64."""
        values = self.rounded(self.rng.normal(size=shape))
        return self.place(values), values.astype(np.float64)

    def zeros(self, *shape: int) -> Tensor:
        return self.place(np.zeros(shape, NUMPY[self.dtype]))

    def int32(self, values: Any) -> Tensor:
        return self.place(np.array(values, np.int32))


@dataclass(frozen=True)
class Result:
    """A result and what it stands for; `slack` may come to its roundings, absolutely (0.5: rounded to an integer)."""

    got: Tensor
    want: np.ndarray
    terms: np.ndarray | None = None  # None: |want|
    slack: float = 0.0
    unit: float | None = None  # None: that of the dtype of `got`

    def roundings(self, ops: Any) -> float:
        """How many roundings would explain the largest difference; infinite for a wrong shape or NaN."""
        host = ops.to_host(self.got)
        got = (host.astype(ms.float32) if host.dtype == ms.bfloat16 else host).asnumpy().astype(np.float64)
        if got.shape != self.want.shape or not np.isfinite(got).all():
            return float("inf")
        unit = UNITS.get(self.got.dtype, 0.0) if self.unit is None else self.unit
        terms = np.abs(self.want) if self.terms is None else self.terms
        off = np.maximum(np.abs(got - self.want) - self.slack, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.where(off == 0, 0, off / (unit * terms)).max(initial=0))


@dataclass(frozen=True)
class Case:
    """`run` calls `operator` with floats of each of the dtypes; `variant` says what is special about the call."""

    operator: str
    variant: str
    run: Callable[[Given], list[Result]]
    dtypes: tuple[Any, ...]
    on_cpu: bool  # False: a CPU has the operator, but it does not do this

    @property
    def name(self) -> str:
        return f"{self.operator} ({self.variant})" if self.variant else self.operator


CASES: list[Case] = []
Run = Callable[[Given], list[Result]]


def case(
    operator: str, variant: str = "", dtypes: tuple[Any, ...] = HALVES, on_cpu: bool = True
) -> Callable[[Run], Run]:
    def register(run: Run) -> Run:
        CASES.append(Case(operator, variant, run, dtypes, on_cpu))
        return run

    return register
