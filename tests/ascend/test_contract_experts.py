"""The calls that experts, packed weights and adapters are made of are ones that MindSpore takes.

Nothing here runs on the hardware.
"""

from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
import pytest

from tests.ascend.checks import ContractError
from tests.ascend.contract import PRIMITIVES, Contract, lacks_kernel
from tests.ascend.mixtures import KINDS, ROUTINGS, adapter_of, choices, experts_of, float32, integer_weight, rows_of
from tests.ascend.steps import normal, weight_of
from tests.ascend.test_contract import Spoiled
from vllm_ms_models.kernels import Integers
from vllm_ms_models.kernels.ascend import AscendKernels, operators

DTYPES = pytest.mark.parametrize("dtype", (ms.float16, ms.bfloat16), ids=str)
SIZES = [48, 16, 16]


@pytest.fixture(scope="module")
def contract() -> Iterator[Contract]:
    contract = Contract()
    yield contract
    functions = sorted({call[0] for call in contract.seen})
    print(f"\nAscend: {contract.calls} calls checked, {len(contract.seen)} distinct in dtypes and shapes: {functions}")


@pytest.fixture(scope="module")
def kernels(contract: Contract) -> AscendKernels:
    return AscendKernels(contract)


@pytest.mark.parametrize("name", ROUTINGS)
def test_choices(kernels: AscendKernels, contract: Contract, name: str) -> None:
    routing, experts, biased, operator = ROUTINGS[name]
    rng = np.random.default_rng(0)
    for tokens in (0, 1, 7):
        bias = float32(rng, (experts,)) if biased else None
        ids, shares = kernels.choose_experts(float32(rng, (tokens, experts)), routing, bias)
        assert ids.shape == shares.shape == (tokens, routing.top_k)
    assert any(call[0] == operator for call in contract.seen)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (7, 3)])
def test_experts(kernels: AscendKernels, dtype: Any, kind: str, tokens: int, top_k: int) -> None:
    rng = np.random.default_rng(0)
    x = normal(rng, (tokens, 64), dtype)
    ids, shares = choices(rng, tokens, top_k, 5, 3)
    pairs = experts_of(kernels, kind, 0, 5, 64, 32, dtype)
    for activation in ("silu", "gelu", "clamped_swiglu"):
        result = kernels.experts(x, *pairs, ids, shares, activation, x, 3)
        assert result.shape == x.shape and result.dtype == dtype


@DTYPES
def test_experts_with_biases(kernels: AscendKernels, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, biases = normal(rng, (7, 64), dtype), [float32(rng, (5, outputs)) for outputs in (64, 64)]
    ids, shares = choices(rng, 7, 3, 5, 0)
    for kind in ("floats", "w8a16", "w4a16"):
        pairs = experts_of(kernels, kind, 0, 5, 64, 32, dtype)
        assert kernels.experts(x, *pairs, ids, shares, "clamped_swiglu", None, 0, *biases).shape == x.shape


@DTYPES
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 32), (4, 0), (4, 64)])
@pytest.mark.parametrize(("sizes", "tokens"), [([48, 48], 0), ([48, 48], 7), ([33], 1)])
def test_packed_weights(
    kernels: AscendKernels, dtype: Any, bits: int, group: int, sizes: list[int], tokens: int
) -> None:
    rng = np.random.default_rng(0)
    for zeros in (False, True):
        weight = integer_weight(kernels, rng, Integers(bits, group, "float"), sizes, 144, zeros)
        result = kernels.linear(normal(rng, (tokens, 144), dtype), weight, float32(rng, (sum(sizes),)))
        assert result.shape == (tokens, sum(sizes)) and result.dtype == dtype


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_adapters(kernels: AscendKernels, dtype: Any, tokens: int) -> None:
    rng = np.random.default_rng(0)
    x, rows = normal(rng, (tokens, 64), dtype), rows_of(rng, tokens, 2)
    adapters = [adapter_of(kernels, rng, SIZES, 64, ranks, dtype) for ranks in ([8, 0, 5], [3, 3, 3])]
    addend = kernels.reduce(x, rows, adapters)
    assert addend.reduced.shape == (tokens, 3 * 8) and addend.reduced.dtype == ms.float32
    weight = weight_of(kernels, rng.normal(size=(80, 64)), SIZES, dtype)
    assert [part.shape[1] for part in kernels.linear_split(x, weight, None, addend)] == SIZES


# --- that a wrong call is found --------------------------------------------------------------------------------


def f16(*shape: int, dtype: Any = ms.float16) -> Any:
    return ms.mint.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("grouped_matmul", lambda: (f16(6, 16), f16(8, 17, 24), f16(8, dtype=ms.int64), None), "shape should be"),
        (
            "grouped_quant_matmul",
            lambda: (
                *(f16(6, 16, dtype=ms.int8), f16(8, 16, 24, dtype=ms.int8), f16(8, dtype=ms.int64)),
                *(f16(8, 24), f16(8, 24, dtype=ms.int32), None, ms.float16),
            ),
            "the scale only support",
        ),
        (
            "weight_quant_matmul",
            lambda: (f16(3, 64), f16(63, 32, dtype=ms.int8), f16(32), None, 0),
            "should be same",
        ),
        (
            "weight_quant_matmul",
            lambda: (f16(3, 64), f16(64, 32), f16(32), None, 0),
            "WeightQuantBatchMatmul",
        ),
    ],
)
def test_mindspore_itself_finds_a_wrong_call(name: str, arguments: Any, message: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message) as caught:
        getattr(operators, name)(*arguments())
    assert not lacks_kernel(PRIMITIVES[name], caught.value)


@pytest.mark.parametrize(
    ("name", "place", "change"),
    [
        ("softmax_top_k", 0, lambda logits: logits.astype(ms.float16)),
        ("sigmoid_group_top_k", 2, lambda groups: groups + 1),
        ("route", 1, lambda ids: ids.astype(ms.int64)),
        ("route", 2, lambda experts: experts - 1),
        ("grouped_matmul", 1, lambda weight: ms.mint.permute(weight, (0, 2, 1)).contiguous()),
        ("grouped_matmul", 2, lambda counts: counts.astype(ms.int32)),
        ("grouped_quant_matmul", 3, lambda scale: scale.astype(ms.bfloat16)),
        ("grouped_quant_matmul", 5, lambda scales: scales.reshape(-1, 1)),
        ("grouped_weight_quant_matmul", 3, lambda scale: scale.astype(ms.float32)),
        ("unpermute", 2, lambda shares: shares.astype(ms.float16)),
        ("fill", 1, lambda mask: mask.reshape(-1)),
        ("weight_quant_matmul", 4, lambda size: 16),
        ("weight_quant_matmul", 2, lambda scale: ms.mint.permute(scale, (1, 0)).contiguous()),
    ],
)
def test_a_spoiled_call_fails(name: str, place: int, change: Any) -> None:
    def call(contract: Contract) -> None:
        kernels, rng = AscendKernels(contract), np.random.default_rng(0)
        x = normal(rng, (7, 64), ms.float16)
        ids, shares = choices(rng, 7, 3, 5, 0)
        for routing in ("Qwen3-MoE", "DeepSeek-V3"):
            choice, experts, biased, _ = ROUTINGS[routing]
            kernels.choose_experts(float32(rng, (7, experts)), choice, float32(rng, (experts,)) if biased else None)
        for kind in ("floats", "dynamic", "w4a16"):
            kernels.experts(x, *experts_of(kernels, kind, 0, 5, 64, 32, ms.float16), ids, shares, "silu")
        kernels.linear(x, integer_weight(kernels, rng, Integers(4, 32, "float"), [48], 64, zeros=True))

    call(Contract())
    with pytest.raises((ContractError, RuntimeError, TypeError, ValueError)):
        call(Spoiled(name, place, change))
