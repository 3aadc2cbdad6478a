"""The C++ kernels against the definitions in `references.py`, for every instruction set of this machine.

All tests of the reference back end run again on these: the import brings them into this module, where the fixture
`kernels` is the C++ back end. The bounds are derived there from float32 arithmetic in any order of summation, which
covers the products of bfloat16 pairs as well: `vdpbf16ps` multiplies exactly and adds in float32. Where probabilities
are rounded to bfloat16 (`references.share_error`), attention has a bound of its own.
"""

from typing import Any

import pytest

from tests.kernels.test_reference import *  # noqa: F403
from tests.kernels.test_reference_attention import *  # noqa: F403
from tests.kernels.test_reference_experts import *  # noqa: F403
from tests.kernels.test_reference_int8_cache import *  # noqa: F403
from tests.kernels.test_reference_integers import *  # noqa: F403
from tests.kernels.test_reference_latent import *  # noqa: F403
from tests.kernels.test_reference_low_rank import *  # noqa: F403
from vllm_ms_models.kernels.cpu import CpuKernels, KernelBuildError
from vllm_ms_models.kernels.cpu.backend import load_module

try:
    ISAS = load_module().isas()
except KernelBuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module", params=ISAS)  # type: ignore[no-redef]
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(request.param)


@pytest.mark.parametrize("block_size", [1, 8, 24])
def test_other_block_sizes_are_refused(kernels: Any, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"blocks of {block_size} positions are not supported; a multiple of 16 is"):
        kernels.cache_shape(4, block_size, 2, 8)


def test_names(kernels: Any) -> None:
    assert kernels.name == "cpu"
    assert kernels.describe().startswith("C++ (")


def test_description() -> None:  # type: ignore[no-redef]
    assert "thread" in CpuKernels().describe()
