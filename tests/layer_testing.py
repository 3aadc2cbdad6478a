"""What tests of layers and of quantization schemes share: back ends, ranks, loading, and when two results agree.

Results are compared with torch's in float64. A test derives how far float32 arithmetic may be off, with `UNIT` the
relative error of one operation (a sum of n products is off by at most (n + 1) UNIT times the sum of the products'
magnitudes, in any order); `assert_close` adds the one rounding to the result's dtype at the end.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.bridge.tensors import DTYPES, to_mindspore, to_torch
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.kernels.cpu import CpuKernels, KernelBuildError
from vllm_ms_models.kernels.reference import ReferenceKernels
from vllm_ms_models.layers.context import ModelContext

UNIT = 2.0**-24

examples = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(list(DTYPES))
token_counts = st.sampled_from((0, 1, 2, 5, 19))
sizes = st.one_of(st.integers(1, 40), st.sampled_from((48, 65, 127)))  # mostly no multiple of a vector


@pytest.fixture(scope="module", params=["reference", "cpu"], autouse=True)
def back_end(request: pytest.FixtureRequest) -> Iterator[kernels.Kernels]:
    """Every test of a module that imports this runs on each back end."""
    before = kernels._active
    try:
        kernels.use(ReferenceKernels() if request.param == "reference" else CpuKernels())
    except KernelBuildError as error:
        pytest.skip(str(error))
    yield kernels.get()
    kernels._active = before


def context(
    dtype: torch.dtype = torch.float32, group: Group | None = None, max_model_len: int = 128, **options: Any
) -> ModelContext:
    return ModelContext(DTYPES[dtype], max_model_len, group or Group(), **options)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers, reproducible."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- loading -----------------------------------------------------------------------------------------------------


def from_file(tensor: torch.Tensor) -> np.ndarray:
    """`tensor` as the checkpoint reader gives it: read-only, bfloat16 as ml_dtypes has it."""
    if tensor.dtype == torch.bfloat16:
        array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = tensor.numpy()
    array = array.copy()
    array.flags.writeable = False
    return array


def load(cell: Any, checkpoint: Mapping[str, torch.Tensor]) -> None:
    """Fill the slots of `cell` from `checkpoint`, which must hold exactly the tensors that are asked for."""
    wanted = set()
    for slot in cell.slots():
        whole = from_file(checkpoint[slot.name])
        assert slot.shape == whole.shape, slot.name
        slot.load(whole[slot.index])
        wanted.add(slot.name)
    assert wanted == set(checkpoint)


# --- ranks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimulatedGroup(Group):
    """A rank of several that run one after the other in this process; the dictionary is the ranks' common one."""

    operands: dict[int, torch.Tensor] = field(default_factory=dict)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._collect(x, lambda parts: torch.stack(parts).double().sum(0).to(parts[0].dtype))

    def all_gather(self, x: Tensor) -> Tensor:
        return self._collect(x, lambda parts: torch.cat(parts, -1))

    def _collect(self, x: Tensor, combine: Callable[[list[torch.Tensor]], torch.Tensor]) -> Tensor:
        self.operands[self.rank] = to_torch(x)
        assert len({part.shape for part in self.operands.values()}) == 1, "a collective takes equal shapes"
        if len(self.operands) < self.size:
            return x
        return to_mindspore(combine([self.operands[rank] for rank in range(self.size)]))


def on_ranks(size: int, run: Callable[[Group], Any]) -> list[Any]:
    """`run(group)` of each of `size` ranks, with at most one collective: it leaves operands first, then results."""
    operands: dict[int, torch.Tensor] = {}
    groups = [SimulatedGroup(rank, size, operands) for rank in range(size)]
    for group in groups:
        run(group)
    return [run(group) for group in groups]


# --- comparing ---------------------------------------------------------------------------------------------------


def call(cell: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`cell` applied to torch tensors (shared, not copied), its results as torch tensors."""
    given = [to_mindspore(value) if isinstance(value, torch.Tensor) else value for value in arguments]
    result = cell(*given, **options)
    return tuple(map(to_torch, result)) if isinstance(result, tuple) else to_torch(result)


def assert_close(got: torch.Tensor, want: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> None:
    """`got` has `dtype`, and is `want` up to `error` and one rounding (half a unit in the last place, or underflow)."""
    assert got.dtype == dtype
    assert got.shape == want.shape
    limits = torch.finfo(dtype)
    allowed = error + (want.abs() + error) * limits.eps / 2 + limits.tiny * limits.eps
    off = (got.double() - want).abs()
    bad = ~(off <= allowed)
    assert not bad.any(), (
        f"{int(bad.sum())} of {got.numel()} values are off, by up to {(off / allowed).max():.3g} times"
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's linear in float64, and the error of float32: n products, the bias and its addition."""
    x, weight = x.double(), weight.double()
    bias = torch.zeros(len(weight)).double() if bias is None else bias.double()
    magnitude = torch.nn.functional.linear(x.abs(), weight.abs(), bias.abs())
    return torch.nn.functional.linear(x, weight, bias), (x.shape[1] + 2) * UNIT * magnitude
