"""Memory of the C++ kernels' weights: how much, where, and when it goes back."""

import gc
import os

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from mindspore import Tensor

from tests.kernels.integers import DYNAMIC
from tests.kernels.references import make_weight
from vllm_ms_models.kernels import Integers
from vllm_ms_models.kernels.cpu import CpuKernels, KernelBuildError, backend

try:
    backend.load_module()
except KernelBuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    return CpuKernels()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_weight_returns_its_memory(kernels: CpuKernels) -> None:
    weight = kernels.new_weight((4096,), 4096, ms.float32)
    source = np.ones((4096, 4096), ml_dtypes.bfloat16)
    before = resident()
    kernels.load_rows(weight, 0, 0, source)
    assert resident() - before > 60 << 20
    del weight
    gc.collect()
    assert resident() - before < 8 << 20


def present(tensor: Tensor) -> int:
    """How many bytes of the pages of a tensor's memory are resident (bit 63 of an entry of Linux's pagemap)."""
    page = os.sysconf("SC_PAGE_SIZE")
    first, last = tensor.data_ptr() // page, (tensor.data_ptr() + tensor.nbytes - 1) // page
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        entries = np.frombuffer(os.pread(file.fileno(), 8 * (last - first + 1), 8 * first), np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(63))) * page


@pytest.mark.parametrize(("kind", "bytes_of_values"), [(DYNAMIC, 32 << 20), (Integers(4, 128, "float"), 16 << 20)])
def test_memory_of_integers(kernels: CpuKernels, kind: Integers, bytes_of_values: int) -> None:
    """None before they are loaded; then that of values and scales, and of zero points once there are some."""
    begin = resident()
    weight = kernels.new_integer_weight((8192,), 4096, kind)
    assert resident() - begin < 4 << 20
    assert present(weight.data) <= 4 << 20  # a huge page at either end, shared with another weight
    groups = kind.groups(4096)
    scales, zeros = np.ones((8192, groups), np.float32), np.zeros((8192, groups), np.int8)
    kernels.load_integers(weight, 0, 0, np.ones((8192, 4096), np.int8))
    kernels.load_scales(weight, 0, 0, scales, zeros)
    # How much more the process has says little: other memory may have gone back meanwhile, or been there already.
    assert present(weight.data) >= bytes_of_values + scales.nbytes
    assert resident() - begin < bytes_of_values + 2 * scales.nbytes + (9 << 20)
    del weight
    gc.collect()
    assert resident() - begin < 10 << 20


@pytest.mark.parametrize("sizes", [(16,), (512, 512)], ids=["2 KiB", "2 MiB"])
def test_more_weights_than_a_process_may_have_mappings(kernels: CpuKernels, sizes: tuple[int, ...]) -> None:
    """Linux allows 65,530; DeepSeek-V3 has 45,000 experts' weights and heads, and there are larger ones."""

    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)

    before, in_use = mappings(), resident()
    weights = [kernels.new_integer_weight(sizes, 2048, DYNAMIC) for _ in range(70_000)]
    assert mappings() - before < 1000
    assert all(weight.data.data_ptr() % 64 == 0 for weight in weights[::1000])
    ones = np.ones((16, 2048), np.int8)
    for weight in weights[::1000]:  # 32 KiB of each, which may take a huge page
        kernels.load_integers(weight, 0, 0, ones)
    del weights, weight
    gc.collect()
    assert mappings() - before < 50
    assert resident() - in_use < 512 << 20  # what Python and malloc keep for 70,000 objects


def test_memory_of_a_small_weight_returns_though_others_live(kernels: CpuKernels) -> None:
    """And comes back as zeros."""
    values = np.ones((1024, 4096), np.float32)
    weights = [make_weight(kernels, values, (1024,), ms.float32) for _ in range(6)]
    before = resident()
    del weights[1:5]
    gc.collect()
    assert before - resident() > 60 << 20
    one = Tensor(np.eye(1, 4096, dtype=np.float32))
    np.testing.assert_array_equal(kernels.linear(one, weights[1]).asnumpy(), np.ones((1, 1024)))
    del weights
    gc.collect()
    fresh = kernels.new_weight((1024,), 4096, ms.float32)
    assert not kernels.linear(one, fresh).asnumpy().any()
