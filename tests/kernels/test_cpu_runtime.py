"""What surrounds the C++ kernels: choice of the instruction set, threads, fork, idling, and memory of the results."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore.utils.dlpack import to_dlpack

from tests.kernels.integers import DYNAMIC
from tests.kernels.references import make_weight, normal, to_array, to_tensor
from vllm_ms_models.kernels.cpu import CpuKernels, KernelBuildError, backend

try:
    module = backend.load_module()
except KernelBuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    return CpuKernels()


@pytest.fixture
def threads() -> Iterator[Any]:
    """Forces a number of threads for one test."""
    yield module.set_threads
    module.set_threads(0)


def product(kernels: CpuKernels, rows: int = 5) -> np.ndarray:
    rng = np.random.default_rng(0)
    weight = make_weight(kernels, normal(rng, (700, 513), ms.bfloat16), (700,), ms.bfloat16)
    return to_array(kernels.linear(to_tensor(normal(rng, (rows, 513), ms.bfloat16), ms.bfloat16), weight))


# --- instruction sets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", module.isas())
def test_the_environment_forces_the_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MS_ISA", isa)
    assert CpuKernels().isa == isa


def test_a_new_process_takes_instruction_set_and_threads_from_its_environment() -> None:
    """Although MindSpore sets OMP_NUM_THREADS=1 in the C environment when it is imported."""
    code = "from vllm_ms_models import compat; compat.absorb_numpy_warning()\n"
    code += "from vllm_ms_models.kernels.cpu import CpuKernels; print(CpuKernels().describe())"
    environment = {**os.environ, "VLLM_MS_ISA": "portable", "OMP_NUM_THREADS": "999"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    count = len(os.sched_getaffinity(0))
    assert done.stdout.startswith(f"C++ (portable, {count} thread"), done.stderr


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MS_ISA", "mmx")
    with pytest.raises(ValueError, match=r"VLLM_MS_ISA='mmx' is not available here; use one of .*portable"):
        CpuKernels()


def test_objects_with_different_instruction_sets_live_side_by_side() -> None:
    assert module.isas()[-1] == "portable"
    best, portable = CpuKernels(module.isas()[0]), CpuKernels("portable")
    weight = make_weight(portable, np.eye(5), (5,), ms.float32)
    x = to_tensor(np.arange(5.0)[None], ms.float32)
    np.testing.assert_array_equal(to_array(best.linear(x, weight)), to_array(portable.linear(x, weight)))


def test_a_weight_of_another_back_end_is_refused(kernels: CpuKernels) -> None:
    from vllm_ms_models.kernels.interface import Weight

    weight = Weight(to_tensor(np.eye(5), ms.float32), (5,), 5, ms.float32)
    with pytest.raises(ValueError, match="their own `new_weight` only"):
        kernels.linear(to_tensor(np.eye(5), ms.float32), weight)


# --- threads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(kernels: CpuKernels, threads: Any, count: int) -> None:
    threads(1)
    alone = [product(kernels, rows) for rows in (1, 5, 200)]
    threads(count)
    assert module.threads() == count
    for want, rows in zip(alone, (1, 5, 200), strict=True):
        np.testing.assert_array_equal(product(kernels, rows), want)


@pytest.mark.parametrize(("text", "limit"), [("", 0), ("3", 3), ("2,4", 2), (" 5 ", 5), ("many", 0), ("-1", 0)])
def test_the_variable_limits_the_threads(text: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert backend._thread_limit() == limit


def test_threads_honour_limit_and_affinity(threads: Any) -> None:
    cpus = os.sched_getaffinity(0)
    try:
        module.set_thread_limit(0)
        threads(0)
        assert module.threads() == len(cpus)
        module.set_thread_limit(1)
        threads(0)
        assert module.threads() == 1
        module.set_thread_limit(0)
        os.sched_setaffinity(0, {min(cpus)})
        threads(0)
        assert module.threads() == 1
    finally:
        os.sched_setaffinity(0, cpus)
        module.set_thread_limit(backend._thread_limit())


def test_calls_from_several_threads_at_once(kernels: CpuKernels) -> None:
    want = product(kernels)
    found: list[bool] = []

    def work() -> None:
        found.extend(np.array_equal(product(kernels), want) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [True] * 80


def test_a_forked_child_computes(kernels: CpuKernels, threads: Any) -> None:
    threads(2)
    x = to_tensor(np.ones((5, 513)), ms.float32)  # made here: MindSpore's own operators do not run in a forked child
    weight = make_weight(kernels, normal(np.random.default_rng(0), (700, 513), ms.float32), (700,), ms.float32)
    want = kernels.linear(x, weight).asnumpy()  # the pool exists now

    def same() -> bool:
        return np.array_equal(kernels.linear(x, weight).asnumpy(), want)

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put((module.threads(), same())))
    child.start()
    assert queue.get(timeout=60) == (2, True)
    child.join(60)
    assert child.exitcode == 0
    assert same()


def test_idle_threads_use_no_processor(kernels: CpuKernels, threads: Any) -> None:
    threads(4)
    product(kernels)
    time.sleep(0.05)
    used, start = time.process_time(), time.monotonic()
    time.sleep(1)
    assert (time.process_time() - used) / (time.monotonic() - start) < 0.03


# --- memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def recycling() -> Iterator[None]:
    """Starts and ends with nothing to recycle."""
    for _ in range(2):
        gc.collect()
        module.set_recycling_limit(0)
        module.set_recycling_limit(768 << 20)
        if not module.recycled_bytes():
            break
    yield
    module.set_recycling_limit(768 << 20)


def test_memory_is_used_again(kernels: CpuKernels, recycling: None) -> None:
    first = module.empty(1, (100, 77))
    address = first.data_ptr()
    assert address % 64 == 0 and first.dtype == ms.bfloat16 and first.shape == (100, 77)
    del first
    assert module.recycled_bytes() >= 100 * 77 * 2
    second = module.empty(0, (50, 77))  # as many bytes
    assert second.data_ptr() == address
    assert module.recycled_bytes() == 0


LOOKS: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda result: result,
    "view": lambda result: result.view(ms.int32 if result.itemsize == 4 else ms.int16),
    "reshape": lambda result: result.reshape(6, 8),
    "slice": lambda result: result[2:],
    "torch": lambda result: torch.utils.dlpack.from_dlpack(to_dlpack(result)),
    "torch of a slice": lambda result: torch.utils.dlpack.from_dlpack(to_dlpack(result[2:])),
    "torch view": lambda result: torch.utils.dlpack.from_dlpack(to_dlpack(result))[3].view(3, 2),
}


@pytest.mark.parametrize("dtype", [0, 1, 2])
@pytest.mark.parametrize("look", LOOKS)
def test_memory_that_something_sees_is_left_alone(recycling: None, dtype: int, look: str) -> None:
    """A view, a slice or a DLPack export keeps the memory; the last of them gives it back."""
    result = module.empty(dtype, (8, 6))
    address = result.data_ptr()
    seen = LOOKS[look](result)
    del result
    gc.collect()
    assert module.recycled_bytes() == 0
    others = [module.empty(dtype, (8, 6)) for _ in range(3)]
    assert address not in {other.data_ptr() for other in others}
    del others
    kept = module.recycled_bytes()
    del seen
    gc.collect()
    assert module.recycled_bytes() > kept


def test_a_numpy_array_made_from_a_result_keeps_its_values(recycling: None) -> None:
    result = module.empty(3, (8, 6))
    result[:] = 7
    array = result.asnumpy()
    del result
    gc.collect()
    others = [module.empty(3, (8, 6)) for _ in range(3)]
    for other in others:
        other[:] = 9
    assert (array == 7).all()


def test_a_result_takes_no_time_for_its_size(recycling: None) -> None:
    """MindSpore's `from_dlpack` would zero as much memory again: 80 ms here, and 320 MB of it."""
    result = module.empty(1, (20_000, 8_000))
    del result
    assert min(seconds(lambda: module.empty(1, (20_000, 8_000))) for _ in range(5)) < 0.001


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_steady_work_allocates_nothing(kernels: CpuKernels, recycling: None) -> None:
    x = to_tensor(np.ones((3, 64)), ms.bfloat16)
    weight = make_weight(kernels, np.eye(64), (40, 24), ms.bfloat16)

    def step() -> set[int]:
        first, second = kernels.linear_split(x, weight)
        return {tensor.data_ptr() for tensor in (first, second, kernels.silu_and_mul(first, first))}

    step()
    free = module.recycled_bytes()
    assert [step() for _ in range(5)].count(step()) == 5
    assert module.recycled_bytes() == free


def test_recycled_memory_is_bounded(recycling: None) -> None:
    module.set_recycling_limit(1 << 20)
    tensors = [module.empty(0, (100 * i, 64)) for i in range(1, 20)]
    del tensors
    assert 0 < module.recycled_bytes() <= 1 << 20
    large = module.empty(0, (1 << 20,))
    del large  # larger than the limit: given back at once
    assert module.recycled_bytes() <= 1 << 20


def test_what_is_in_use_counts_towards_the_bound(recycling: None) -> None:
    module.set_recycling_limit(8 << 20)
    kept = [module.empty(0, (1 << 20,)), module.empty(0, (3 << 18,))]  # 7 MiB
    first, second = module.empty(0, (1 << 18,)), module.empty(0, (3 << 16,))  # 1 and 0.75
    del first
    assert module.recycled_bytes() == 0  # 7.75 are in use
    del second
    assert module.recycled_bytes() == 3 << 18
    del kept
    assert 7 << 20 < module.recycled_bytes() <= 8 << 20


def test_memory_goes_back_when_the_process_is_idle(kernels: CpuKernels, threads: Any, recycling: None) -> None:
    threads(2)
    large = [module.empty(0, (1 << 23,)) for _ in range(5)]  # 32 MiB each
    del large
    product(kernels, 200)
    assert module.recycled_bytes() >= 160 << 20
    time.sleep(3)
    assert 32 << 20 <= module.recycled_bytes() <= 64 << 20


def test_nothing_at_all(kernels: CpuKernels) -> None:
    """Zero tokens, zero rows, zero inputs."""
    empty = module.empty(1, (0, 64))
    weight = make_weight(kernels, np.eye(64), (40, 24), ms.bfloat16)
    assert kernels.linear(empty, weight).shape == (0, 64)
    assert [part.shape for part in kernels.linear_split(empty, weight)] == [(0, 40), (0, 24)]
    assert kernels.silu_and_mul(empty, empty).shape == (0, 64)
    nothing = kernels.new_weight((0, 5), 0, ms.float32)
    x = module.empty(0, (3, 0))
    np.testing.assert_array_equal(to_array(kernels.linear(x, nothing)), np.zeros((3, 5)))
    integers = kernels.new_integer_weight((0, 5), 0, DYNAMIC)
    np.testing.assert_array_equal(to_array(kernels.linear(x, integers)), np.zeros((3, 5)))


# --- refusals --------------------------------------------------------------------------------------------------


def test_unfit_arguments_are_refused_in_a_sentence(kernels: CpuKernels) -> None:
    x, y = module.empty(1, (2, 8)), module.empty(0, (2, 8))
    weight = kernels.new_weight((3,), 8, ms.bfloat16)
    for call, message in (
        (lambda: kernels.silu_and_mul(1, x), "gate is a <class 'int'>; a tensor is expected."),
        (lambda: kernels.silu_and_mul(x, y), "up has dtype Float32; bfloat16 is expected."),
        (lambda: kernels.silu_and_mul(x.T, x), "gate is not contiguous."),
        (lambda: kernels.silu_and_mul(x, x[:1]), "up has shape (1, 8); (2, 8) is expected."),
        (lambda: kernels.linear(x[0], weight), "x has 1 axes; 2 are expected."),
        (lambda: kernels.linear(x, weight, y), "bias has shape (2, 8); (3,) is expected."),
        (lambda: kernels.linear(x.view(4, 4), weight), "x has 4 features; the weight has 8 inputs."),
        (lambda: kernels.linear(x, weight, dtype=ms.int8), "A result cannot have dtype Int8; float32, bfloat16 and"),
        (lambda: kernels.embedding(x, weight), "ids has dtype BFloat16; int32 or int64 is expected."),
        (lambda: kernels.write_kv(x, x, y, y), "cache has dtype Float32; bfloat16 or int8 is expected."),
        (lambda: kernels.write_kv(x, x, x, y), "cache has shape (2, 8); (Ellipsis, 2, Ellipsis, Ellipsis, Ellipsis)"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(message)
