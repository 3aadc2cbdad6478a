"""Mixtures of experts of the Ascend back end, on operators that do what is documented, against the reference's.

Nothing here runs on the hardware.
"""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from tests.ascend.arrays import wide
from tests.ascend.comparing import DTYPES, both, close, in_float32, unit
from tests.ascend.mixtures import KINDS, ROUTINGS, choices, experts_of, float32
from tests.ascend.steps import normal
from vllm_ms_models.kernels import Kernels, Routing, Weight

WIDTH, SIZE, EXPERTS = 64, 32, 5


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_choice(name: str, tokens: int) -> None:
    ascend, reference, standin = both()
    routing, experts, biased, operator = ROUTINGS[name]
    rng = np.random.default_rng(1)
    logits, bias = float32(rng, (tokens, experts)), float32(rng, (experts,)) if biased else None
    (ids, shares), (want_ids, want_shares) = (k.choose_experts(logits, routing, bias) for k in (ascend, reference))
    assert np.array_equal(ids.asnumpy(), want_ids.asnumpy()) and ids.dtype == want_ids.dtype
    # A share is a quotient of sums of a few exponentials, which NumPy and MindSpore compute: some roundings each.
    np.testing.assert_allclose(shares.asnumpy(), want_shares.asnumpy(), rtol=64 * unit(ms.float32))
    assert shares.dtype == ms.float32 and (operator in standin.called) == (tokens > 0)


def test_choices_that_cannot_be_are_refused() -> None:
    ascend, _, _ = both()
    rng = np.random.default_rng(1)
    for logits, routing, bias in (
        (float32(rng, (3, 8)), Routing(9), None),
        (float32(rng, (3, 8)), Routing(2, groups=3), None),
        (float32(rng, (3, 8)), Routing(2), float32(rng, (7,))),
        (float32(rng, (3, 8)).astype(ms.float16), Routing(2), None),
    ):
        with pytest.raises(ValueError):
            ascend.choose_experts(logits, routing, bias)


GROUPED = {
    "floats": "grouped_matmul",
    "dynamic": "grouped_quant_matmul",
    "static": "grouped_quant_matmul",
    "w8a16": "grouped_weight_quant_matmul",
    "w4a16": "grouped_weight_quant_matmul",
    "w4a16, by output": "grouped_weight_quant_matmul",
}


CASES = [
    pytest.param(kind, activation, *step, marks=() if number % 5 == place % 5 else pytest.mark.slow)
    for place, kind in enumerate(KINDS)
    for number, (activation, step) in enumerate(
        (activation, step)
        for activation in ("silu", "gelu_tanh", "clamped_swiglu")
        for step in ((0, 0, False), (1, 0, False), (23, 7, False), (23, 7, True))
    )
]


@pytest.mark.parametrize(("kind", "activation", "tokens", "first", "biased"), CASES)
def test_experts(
    kind: str, activation: str, tokens: int, first: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: the two sides differ in the order of sums alone.

    (And where an activation, off in its last bit, lies in the middle between two integers: not with these numbers.)
    """
    in_float32(monkeypatch)
    ascend, reference, standin = both()
    rng = np.random.default_rng(1)
    x, addend = (normal(rng, (tokens, WIDTH), ms.float32) for _ in range(2))
    ids, shares = choices(rng, tokens, 3, EXPERTS, first)
    biases = [float32(rng, (EXPERTS, outputs)) for outputs in (2 * SIZE, WIDTH)] if biased else []
    weights = [experts_of(kernels, kind, 3, EXPERTS, WIDTH, SIZE, ms.float32) for kernels in (ascend, reference)]
    for added in (None, addend):  # twice: the first call stacks weights
        arguments = ids, shares, activation, added, first, *biases
        got, want = (k.experts(x, *pair, *arguments) for k, pair in zip((ascend, reference), weights, strict=True))
        close(got, want)
    fused = kind in GROUPED and not (biased and kind in ("dynamic", "static"))
    assert (GROUPED.get(kind) in standin.called) == (fused and tokens > 0)
    if fused and tokens:
        assert all(weight.data.size == 0 for pair in weights[0] for weight in pair)  # the stack has them now
        with pytest.raises(ValueError, match="always pass the same ones"):
            ascend.experts(x, weights[0][0][1:], weights[0][1][1:], *arguments[:5], *(b[1:] for b in biases))


@DTYPES
@pytest.mark.parametrize("kind", ["floats", "dynamic"])
def test_rounded_experts(dtype: Any, kind: str) -> None:
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    x, addend = (normal(rng, (23, WIDTH), dtype) for _ in range(2))
    ids, shares = choices(rng, 23, 3, EXPERTS, 0)
    results = []
    for kernels in (ascend, reference):
        pairs = experts_of(kernels, kind, 3, EXPERTS, WIDTH, SIZE, dtype)
        results.append(kernels.experts(x, *pairs, ids, shares, "silu", addend))
    matrices = [[np.abs(matrix(reference, weight)) for weight in weights] for weights in pairs]
    allowed, int8 = 2 * unit(dtype) * np.abs(wide(addend)), kind == "dynamic"
    for token, k in np.argwhere((ids.asnumpy() >= 0) & (ids.asnumpy() < EXPERTS)):
        share, row = shares.asnumpy()[token, k], np.abs(wide(x)[token])
        gate_up, down = (each[ids.asnumpy()[token, k]] for each in matrices)
        gate, up = np.split(gate_up @ row, 2)
        # Gate and up are rounded, their scales are (of int8), and so is their product: 4 roundings, at slopes of at
        # most 1.13. To int8 it may be rounded to the other side of a middle, by 1 / 127 of the row's largest.
        off = 5 * unit(dtype) * gate * up
        off = off + ((gate * up).max() / 127 if int8 else 0)
        # The second product's scales and the product are rounded, and their sum on either side.
        allowed[token] += share * (down @ off + 4 * unit(dtype) * (down @ (gate * up)))
    close(results[0], results[1], allowed)


def matrix(kernels: Kernels, weight: Weight) -> np.ndarray:
    eye = Tensor(np.eye(weight.in_features, dtype=np.float32))
    return kernels.linear(eye, weight, dtype=ms.float32).asnumpy().T


def test_experts_that_do_not_fit_are_refused() -> None:
    ascend, _, _ = both()
    gate_up, down = experts_of(ascend, "floats", 3, 2, WIDTH, SIZE, ms.float16)
    rng = np.random.default_rng(1)
    x = normal(rng, (3, WIDTH), ms.float16)
    ids, shares = choices(rng, 3, 1, 2, 0)
    for arguments in (
        (x, gate_up, down[:1], ids, shares, "silu"),
        (x, down, down, ids, shares, "silu"),
        (x, gate_up, gate_up, ids, shares, "silu"),
        (x, gate_up, down, ids[:2], shares, "silu"),
        (x, gate_up, down, ids, shares, "silu", x[:2]),
        (x, gate_up, down, ids, shares, "silu", None, 0, float32(rng, (2, SIZE))),
        (x, gate_up, down, ids, shares, "silu", None, 0, None, float32(rng, (1, WIDTH))),
        (x, gate_up, down, ids, shares, "relu"),
    ):
        with pytest.raises(ValueError):
            ascend.experts(*arguments)
