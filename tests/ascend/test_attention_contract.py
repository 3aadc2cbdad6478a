"""Every operator call of the Ascend back end's attention is one that MindSpore takes. Nothing runs on the hardware.

As test_contract.py, for windows, both directions, soft caps, sinks, caches of int8 and expanded latents; and shapes of
their results are those that MindSpore infers.
"""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint

from tests.ascend.checks import ContractError
from tests.ascend.contract import PRIMITIVES, Contract, lacks_kernel
from tests.ascend.inference import RESULTS, Recorder, inferred
from tests.ascend.steps import BLOCK, STEPS, Step, normal, step_of
from vllm_ms_models.kernels.ascend import AscendKernels, operators
from vllm_ms_models.kernels.ascend.device import check_device

DTYPES = pytest.mark.parametrize("dtype", (ms.float16, ms.bfloat16), ids=str)
# Options of a layer, the size of its heads, and the operators they take in a step of whole sequences, and in others.
PAGED = {"reshape_and_cache", "paged_attention"}
FLASH = {"reshape_and_cache", "flash_attention"}
PLAIN = {"reshape_and_cache", "gather", "batch_matmul", "softmax"}
OWN = {"index_put", "gather", "batch_matmul", "softmax"}
CASES: dict[str, tuple[dict[str, Any], int, set[str], set[str]]] = {
    "window": ({"window": 9}, 64, PAGED, PAGED),
    "wide window": ({"window": 99}, 64, FLASH, PAGED),
    "both directions": ({"causal": False}, 64, FLASH, PAGED),
    "soft cap": ({"soft_cap": 30.0, "window": 9}, 64, PLAIN | {"tanh"}, PLAIN | {"tanh"}),
    "sinks": ({"sinks": True}, 64, PLAIN, PLAIN),
    "odd heads": ({"causal": False}, 72, OWN, OWN),
    "large heads": ({}, 576, PAGED, PAGED),
    "int8": ({"storage": ms.int8}, 64, OWN, OWN),
}


def attend(kernels: AscendKernels, step: Step, dtype: Any, size: int, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    options = dict(options)
    storage = options.pop("storage", None)
    if "sinks" in options:
        options["sinks"] = mint.zeros(4)
    shape = kernels.cache_shape(step.blocks, BLOCK, 2, size, storage)
    cache = mint.zeros(shape, dtype=storage or dtype)
    query, key, value = (normal(rng, (step.tokens, heads * size), dtype) for heads in (4, 2, 2))
    kernels.write_kv(key, value, cache, step.slots)
    result = kernels.paged_attention(query, cache, step.sequences, 0.125, **options)
    assert result.shape == query.shape and result.dtype == dtype


def expand(kernels: AscendKernels, step: Step, dtype: Any) -> None:
    """DeepSeek-V3's sizes, of two heads."""
    rng = np.random.default_rng(0)
    cache = mint.zeros(kernels.latent_cache_shape(step.blocks, BLOCK, 576), dtype=dtype)
    keys, values = ([kernels.new_weight([128], 512, dtype) for _ in range(2)] for _ in range(2))
    query = normal(rng, (step.tokens, 2 * 192), dtype)
    assert kernels.mla_prefill(query, cache, step.sequences, keys, values, 0.1).shape == (step.tokens, 256)


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_calls(dtype: Any, case: str) -> None:
    options, size, whole, others = CASES[case]
    for name, pairs in STEPS.items():
        contract = Contract()
        attend(AscendKernels(contract), step_of(pairs, np.random.default_rng(0)), dtype, size, options)
        want = whole if name in ("one token", "ragged prefill") else others if pairs else set()
        if name == "one token" and case == "window":
            want = FLASH  # which hides nothing
        assert {call[0] for call in contract.seen} == want


@DTYPES
@pytest.mark.parametrize("name", ["ragged prefill", "mixed with context", "empty"])
def test_calls_of_expanded_latents(dtype: Any, name: str) -> None:
    contract = Contract()
    expand(AscendKernels(contract), step_of(STEPS[name], np.random.default_rng(0)), dtype)
    assert ("flash_attention" in {call[0] for call in contract.seen}) == (name == "ragged prefill")


@DTYPES
def test_shapes_are_those_that_mindspore_infers(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    kernels = AscendKernels(recorder)
    whole, decode = (step_of(STEPS[name], np.random.default_rng(0)) for name in ("one token", "decode"))
    attend(kernels, decode, dtype, 64, {"window": 9})
    attend(kernels, whole, dtype, 64, {"causal": False})
    attend(kernels, decode, dtype, 64, {"soft_cap": 30.0, "sinks": True})
    attend(kernels, whole, dtype, 64, {"storage": ms.int8})
    expand(kernels, whole, dtype)
    checked: set[Any] = set()
    for name, primitive, arguments, results in recorder.records:
        signature = name, *(tuple(x.shape) for x in arguments if isinstance(x, Tensor))
        if results is None or signature in checked:
            continue  # ReshapeAndCache and InplaceIndexPut write, so no graph leaves them out
        count, used = RESULTS.get(name, (1, (0,)))
        found = inferred(primitive, arguments, count)
        want = results if isinstance(results, tuple) else (results,)
        assert [found[i] for i in used] == [(tuple(x.shape), x.dtype) for x in want], name
        checked.add(signature)
    names = {signature[0] for signature in checked}
    assert {"PagedAttention", "FlashAttentionScore", "BatchMatMul", "Tanh", "Softmax", "Gather"} <= names


def zeros(*shape: int, dtype: Any = ms.float32) -> Tensor:
    return mint.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("batch_matmul", lambda: (zeros(2, 3, 4), zeros(2, 3, 5), True), "should be same as the col"),
        ("batch_matmul", lambda: (zeros(2, 3, 4), zeros(3, 4, 5), False), "batch|broadcast"),
    ],
)
def test_mindspore_itself_finds_a_wrong_call(name: str, arguments: Any, message: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message) as caught:
        getattr(operators, name)(*arguments())
    assert not lacks_kernel(PRIMITIVES[name], caught.value)


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        ([0, 1], zeros(2, 4, dtype=ms.float16), "values of the target's dtype"),
        ([0, 1], zeros(2, 3), "rows as wide as the target's"),
        ([0, 3], zeros(2, 4), "rows that exist"),
        ([1, 1], zeros(2, 4), "no row twice"),
    ],
)
def test_the_contract_finds_a_wrong_index_put(rows: list[int], values: Tensor, message: str) -> None:
    """MindSpore itself does not look at these arguments before there is a kernel."""
    with pytest.raises(ContractError, match=message):
        Contract().index_put(zeros(3, 4), Tensor(rows, ms.int32), values)


def test_devices() -> None:
    check_device("Ascend910B2")
    with pytest.raises(NotImplementedError, match=r"do not have the cache layout \(NZ\) that Ascend310P3 needs"):
        check_device("Ascend310P3")
