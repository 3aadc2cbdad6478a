"""Packed weights, adapters and gated activations of the Ascend back end, on operators that do what is documented.

Nothing here runs on the hardware.
"""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from tests.ascend.arrays import wide
from tests.ascend.comparing import DTYPES, both, close, in_float32, unit
from tests.ascend.mixtures import adapter_of, float32, integer_weight, rows_of
from tests.ascend.steps import normal, weight_of
from vllm_ms_models.kernels import Integers

PACKED = [(8, 0), (8, 32), (8, 96), (8, 512), (4, 0), (4, 32), (4, 64)]
packed = pytest.mark.parametrize(("bits", "group"), PACKED)
QUICK = [(8, 0), (4, 32)]


@pytest.mark.parametrize(
    ("bits", "group"), [pytest.param(*kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in PACKED]
)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("sizes", "tokens"), [([48, 48], 0), ([48, 48], 9), ([33], 1)])
def test_packed_weights(
    bits: int, group: int, zeros: bool, sizes: list[int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: sums in another order. (With 33 outputs, 4 bits are kept in bytes: they cannot be paired.)"""
    in_float32(monkeypatch)
    ascend, reference, standin = both()
    rng = np.random.default_rng(1)
    x, bias = normal(rng, (tokens, 144), ms.float32), float32(rng, (sum(sizes),))
    weights = [
        integer_weight(k, np.random.default_rng(2), Integers(bits, group, "float"), sizes, 144, zeros)
        for k in (ascend, reference)
    ]
    for _ in range(2):
        got, want = (k.linear(x, weight, bias) for k, weight in zip((ascend, reference), weights, strict=True))
        close(got, want)
    assert standin.called.count("weight_quant_matmul") == (2 if tokens else 0)
    if tokens:
        with pytest.raises(ValueError, match="load all of it before the first product"):
            ascend.load_integers(weights[0], 0, 0, np.zeros((1, 144), np.int8))


@DTYPES
@packed
def test_rounded_packed_weights(dtype: Any, bits: int, group: int) -> None:
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    x = normal(rng, (9, 144), dtype)
    mine, theirs = (
        integer_weight(k, np.random.default_rng(2), Integers(bits, group, "float"), [48, 48], 144, True)
        for k in (ascend, reference)
    )
    # A unit vector says what the matrix is; loading asks so, in float32, and before the first product.
    eye = Tensor(np.eye(144, dtype=np.float32))
    matrix = reference.linear(eye, theirs)
    close(ascend.linear(eye, mine), matrix)
    scaled = np.abs(wide(x)) @ np.abs(matrix.asnumpy())  # scales are rounded to the dtype
    for got, want in zip(ascend.linear_split(x, mine), reference.linear_split(x, theirs), strict=True):
        part, scaled = scaled[:, : want.shape[1]], scaled[:, want.shape[1] :]
        close(got, want, unit(dtype) * part)


def test_packed_weights_that_cannot_be() -> None:
    ascend, _, _ = both()
    with pytest.raises(NotImplementedError, match="groups of multiples of 32 inputs, not of 48"):
        ascend.new_integer_weight([8], 144, Integers(4, 48, "float"))
    with pytest.raises(NotImplementedError, match="at most 65535 inputs and outputs, not of 32 and 70000"):
        ascend.new_integer_weight([70000], 32, Integers(8, 0, "float"))
    weight = ascend.new_integer_weight([8], 144, Integers(4, 0, "float"))
    with pytest.raises(ValueError, match="does not fit 4 bits"):
        ascend.load_integers(weight, 0, 0, np.full((1, 144), 8, np.int8))
    with pytest.raises(ValueError, match="have no scale of their own"):
        ascend.set_input(weight, 0, 1.0, 0)


def test_unit_vectors_of_int8_weights() -> None:
    """As loading asks of latent attention's matrices, in float32: 127 times a 127th, so exact but for that."""
    ascend, reference, _ = both()
    eye = Tensor(np.eye(64, dtype=np.float32))
    got, want = (
        k.linear(eye, integer_weight(k, np.random.default_rng(2), Integers(8, 0, "dynamic"), [48], 64))
        for k in (ascend, reference)
    )
    close(got, want)


ADAPTERS = ([8, 0, 5], [3, 3, 3], [0, 4, 0])
SIZES = [48, 16, 16]


@pytest.mark.parametrize("tokens", [0, 1, 23])
@pytest.mark.parametrize("activations", ["floats", "dynamic"])
def test_adapters(tokens: int, activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: sums in another order. Two of the adapters leave parts as they are; one is missing."""
    in_float32(monkeypatch)
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    x, bias, rows = normal(rng, (tokens, 64), ms.float32), float32(rng, (80,)), rows_of(rng, tokens, 4)
    results = []
    for kernels in (ascend, reference):
        own = np.random.default_rng(2)
        adapters = [adapter_of(kernels, own, SIZES, 64, ranks, ms.float32) for ranks in ADAPTERS]
        if activations == "floats":
            weight = weight_of(kernels, own.normal(size=(80, 64)), SIZES, ms.float32)
        else:
            weight = integer_weight(kernels, own, Integers(8, 0, "dynamic"), SIZES, 64)
        addend = kernels.reduce(x, rows, [*adapters, None])
        split = kernels.linear_split(x, weight, bias, addend)
        results.append((addend.reduced, kernels.linear(x, weight, bias, ms.float32, addend), *split))
    for got, want in zip(*results, strict=True):
        close(got, want)
    with pytest.raises(ValueError, match="a row has adapter 7; there are 1"):
        ascend.reduce(x, Tensor(np.full(max(tokens, 1), 7, np.int32)), [None])


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu"])
def test_gated_activations_and_rounded_adapters(dtype: Any, activation: str) -> None:
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    x, bias, rows = normal(rng, (23, 64), dtype), float32(rng, (96,), dtype), rows_of(rng, 23, 2)
    gated, products = [], []
    for kernels in (ascend, reference):
        own = np.random.default_rng(2)
        weight = weight_of(kernels, own.normal(size=(96, 64)), [48, 48], dtype)  # products about 8: some are clamped
        adapters = [adapter_of(kernels, own, [48, 48], 64, ranks, dtype) for ranks in ([4, 2], [0, 8])]
        addend = kernels.reduce(x, rows, adapters)
        close(addend.reduced, reference.reduce(x, rows, adapters).reduced)  # float32 on both sides
        gated.append(kernels.linear_gated(x, weight, activation, bias, addend))
        products.append(wide(kernels.linear(x, weight, None, ms.float32)))
        products.append(wide(kernels.linear(x, weight, bias, ms.float32, addend)))
    # Gate and up are rounded before the bias, after it, and with the adapter; slopes are at most 1.13, or 1.2 for the
    # sigmoid of 1.702 g, and `up + 1` is no larger than 8.
    before, after = (np.abs(product) for product in products[2:])
    gate, up = np.split(3 * unit(dtype) * (before + after + np.abs(wide(bias))), 2, 1)
    gate_size, up_size = np.split(after, 2, 1)
    if activation == "clamped_swiglu":
        gate_size, up_size = np.minimum(gate_size, 7), np.minimum(up_size, 7) + 1
    close(gated[0], gated[1], 1.2 * (gate * up_size + up * gate_size + gate * up) + unit(dtype) * gate_size * up_size)
