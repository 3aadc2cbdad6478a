"""The C++ kernels against the definitions in `references.py`, for every instruction set of this machine.

All tests of the reference back end run again on these: the import brings them into this module, where the fixture
`kernels` is the C++ back end. The bounds are derived there from float32 arithmetic in any order of summation, which
covers the products of bfloat16 pairs as well: `vdpbf16ps` multiplies exactly and adds in float32.
"""

from typing import Any

import pytest

from tests.kernels.test_reference import *  # noqa: F403
from vllm_ms_models.kernels.cpu import CpuKernels, KernelBuildError
from vllm_ms_models.kernels.cpu.backend import load_module

try:
    ISAS = load_module().isas()
except KernelBuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module", params=ISAS)  # type: ignore[no-redef]
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(request.param)


def test_names(kernels: Any) -> None:
    assert kernels.name == "cpu"
    assert kernels.describe().startswith("C++ (")


def test_description() -> None:  # type: ignore[no-redef]
    assert "thread" in CpuKernels().describe()
