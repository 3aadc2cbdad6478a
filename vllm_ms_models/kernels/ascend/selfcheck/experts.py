"""Mixtures of experts and weights of integers on tiny inputs, and in NumPy what they mean. **Not run on hardware.**"""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models.kernels.ascend.selfcheck.cases import APPROXIMATED, Given, Result, case

FLOAT32 = (ms.float32,)
COUNTS = [3, 0, 4]  # rows of each expert
INPUTS, OUTPUTS, GROUP = 64, 48, 32


def _best(values: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-values, -1, kind="stable")[:, :k]


def _at(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, ids, -1)


@case("softmax_top_k", dtypes=FLOAT32)
def softmax_top_k(given: Given) -> list[Result]:
    logits, values = given.floats(5, 16)
    shares = np.exp(values) / np.exp(values).sum(-1, keepdims=True)
    ids = _best(shares, 4)
    found, places = given.ops.softmax_top_k(logits, 4)
    return [Result(found, _at(shares, ids), unit=APPROXIMATED), Result(places, ids)]


@case("sigmoid_group_top_k", dtypes=FLOAT32)
def sigmoid_group_top_k(given: Given) -> list[Result]:
    (logits, values), (bias, addends) = given.floats(5, 64), given.floats(64)
    scores = 1 / (1 + np.exp(-values))
    ranks = (scores + addends).reshape(5, 8, 8)
    of_groups = np.sort(ranks, -1)[..., -2:].sum(-1)
    np.put_along_axis(ranks, _best(of_groups, 8)[:, 4:, None], -np.inf, 1)
    ids = _best(ranks.reshape(5, 64), 6)
    shares = _at(scores, ids)
    found, places = given.ops.sigmoid_group_top_k(logits, bias, 8, 4, 2, 6, 2.5)
    return [Result(found, shares / shares.sum(-1, keepdims=True) * 2.5, unit=APPROXIMATED), Result(places, ids)]


@case("top_k", dtypes=FLOAT32)
def top_k(given: Given) -> list[Result]:
    x, values = given.floats(5, 64)
    ids = _best(values, 6)
    found, places = given.ops.top_k(x, 6)
    return [Result(found, _at(values, ids)), Result(places, ids)]


@case("ascending", dtypes=(ms.int32,))
def sort(given: Given) -> list[Result]:
    numbers = given.rng.integers(0, 100, 40)
    return [Result(given.ops.ascending(given.int32(numbers)), np.sort(numbers))]


@case("fill")
def fill(given: Given) -> list[Result]:
    x, values = given.floats(4, 32)
    mask = np.array([[True], [False], [False], [True]])
    return [Result(given.ops.fill(x, given.place(mask), 0.0), np.where(mask, 0, values))]


@case("route")
def route(given: Given) -> list[Result]:
    x, values = given.floats(5, 32)
    ids = np.array([[2, 0], [1, 2], [0, 2], [2, 0], [0, 3]])
    order = np.argsort(ids.ravel(), kind="stable")
    rows, places, counts = given.ops.route(x, given.int32(ids), 5)
    return [
        Result(rows, values[order // 2]),
        Result(places, np.argsort(order)),
        Result(counts, np.bincount(ids.ravel(), minlength=5)),
    ]


@case("unpermute")
def unpermute(given: Given) -> list[Result]:
    rows, values = given.floats(10, 32)
    places, shares = given.rng.permutation(10), given.rng.uniform(0.1, 1, (5, 2)).astype(np.float32)
    parts = values[places].reshape(5, 2, 32) * shares[..., None]
    got = given.ops.unpermute(rows, given.int32(places), given.place(shares))
    return [Result(got, parts.sum(1), np.abs(parts).sum(1))]


def _by_expert(rows: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    parts = np.split(rows, np.cumsum(COUNTS)[:-1])
    return np.concatenate([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


@case("grouped_matmul")
def grouped_matmul(given: Given) -> list[Result]:
    (x, a), (weight, b) = given.floats(sum(COUNTS), INPUTS), given.floats(len(COUNTS), INPUTS, OUTPUTS)
    got = given.ops.grouped_matmul(x, weight, given.place(np.array(COUNTS)), None)
    return [Result(got, _by_expert(a, b), _by_expert(np.abs(a), np.abs(b)))]


@case("grouped_quant_matmul")
def grouped_quant_matmul(given: Given) -> list[Result]:
    x, weight = (
        given.rng.integers(-127, 128, n).astype(np.int8) for n in ((sum(COUNTS), INPUTS), (3, INPUTS, OUTPUTS))
    )
    scales = given.rng.uniform(1e-4, 1e-3, (3, OUTPUTS)).astype(np.float32)
    bias = given.rng.integers(-500, 500, (3, OUTPUTS)).astype(np.int32)
    tokens = given.rng.uniform(0.5, 1, sum(COUNTS)).astype(np.float32)
    scales = given.rounded(scales) if given.dtype == ms.bfloat16 else scales
    expert = np.repeat(np.arange(3), COUNTS)
    sums = _by_expert(x.astype(np.float64), weight.astype(np.float64)) + bias[expert]
    numbers = [given.place(array) for array in (x, weight, np.array(COUNTS), scales, bias, tokens)]
    got = given.ops.grouped_quant_matmul(*numbers, given.dtype)
    return [Result(got, sums * scales.astype(np.float64)[expert] * tokens[:, None])]


def _pairs(given: Given, values: np.ndarray) -> Tensor:
    """int4 `[..., out]`, two in a byte, the first in the lower bits."""
    nibbles = values.view(np.uint8) & 15
    packed = np.ascontiguousarray(nibbles[..., ::2] | nibbles[..., 1::2] << 4)
    return given.ops.to_device(Tensor(packed.view(np.int8), ms.qint4x2))


@case("weight_quant_matmul", "int8")
def weight_quant_matmul(given: Given) -> list[Result]:
    values = given.rng.integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8)
    (x, a), (scale, factors) = given.floats(3, INPUTS), given.floats(OUTPUTS)
    matrix = values * factors
    return [
        Result(
            given.ops.weight_quant_matmul(x, given.place(values), scale, None, 0), a @ matrix, np.abs(a) @ abs(matrix)
        )
    ]


@case("weight_quant_matmul", "4 bits in groups, zero points")
def weight_quant_matmul_in_groups(given: Given) -> list[Result]:
    values = given.rng.integers(-8, 8, (INPUTS, OUTPUTS)).astype(np.int8)
    zeros = given.rounded(given.rng.integers(-8, 8, (INPUTS // GROUP, OUTPUTS)))
    (x, a), (scale, factors) = given.floats(3, INPUTS), given.floats(INPUTS // GROUP, OUTPUTS)
    # The sum of two such integers is exact.
    matrix = (values + np.repeat(zeros.astype(np.float64), GROUP, 0)) * np.repeat(factors, GROUP, 0)
    got = given.ops.weight_quant_matmul(x, _pairs(given, values), scale, given.place(zeros), GROUP)
    return [Result(got, a @ matrix, np.abs(a) @ abs(matrix))]


@case("grouped_weight_quant_matmul", "4 bits in groups")
def grouped_weight_quant_matmul(given: Given) -> list[Result]:
    values = given.rng.integers(-8, 8, (3, INPUTS, OUTPUTS)).astype(np.int8)
    (x, a), (scale, factors) = given.floats(sum(COUNTS), INPUTS), given.floats(3, INPUTS // GROUP, OUTPUTS)
    matrices = values * np.repeat(factors, GROUP, 1)
    got = given.ops.grouped_weight_quant_matmul(
        x, _pairs(given, values), given.place(np.array(COUNTS)), scale, None, None
    )
    return [Result(got, _by_expert(a, matrices), _by_expert(np.abs(a), np.abs(matrices)))]
