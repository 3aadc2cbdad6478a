"""Matrices, activations and norms on tiny inputs, and in NumPy what they mean. **Not run on hardware.**"""

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np

from vllm_ms_models.kernels.ascend.selfcheck.cases import APPROXIMATED, HALVES, Given, Result, case


@case("matmul")
def matmul(given: Given) -> list[Result]:
    (x, a), (w, b) = given.floats(3, 64), given.floats(48, 64)
    return [Result(given.ops.matmul(x, w), a @ b.T, np.abs(a) @ np.abs(b).T)]


@case("batch_matmul", dtypes=(*HALVES, ms.float32))
def batch_matmul(given: Given) -> list[Result]:
    (x, a), (y, b), (z, c) = given.floats(2, 3, 64), given.floats(2, 64, 48), given.floats(2, 48, 64)
    c = c.transpose(0, 2, 1)
    return [
        Result(given.ops.batch_matmul(x, y, False), a @ b, np.abs(a) @ np.abs(b)),
        Result(given.ops.batch_matmul(x, z, True), a @ c, np.abs(a) @ np.abs(c)),
    ]


@case("gather")
def gather(given: Given) -> list[Result]:
    table, values = given.floats(40, 32)
    return [Result(given.ops.gather(table, given.int32([0, 39, 7, 7])), values[[0, 39, 7, 7]])]


@case("write_rows", on_cpu=False)  # a CPU's InplaceCopy writes a part of a tensor elsewhere
def write_rows(given: Given) -> list[Result]:
    rows, values = given.floats(3, 32)
    target = given.zeros(6, 32)
    given.ops.write_rows(target, 2, rows)
    return [Result(target, np.concatenate((np.zeros((2, 32)), values, np.zeros((1, 32)))))]


@case("index_put", dtypes=(ms.int8, *HALVES))
def index_put(given: Given) -> list[Result]:
    values = given.rounded(given.rng.integers(-127, 128, (3, 32)))
    target = given.zeros(6, 32)
    given.ops.index_put(target, given.int32([4, 0, 1]), given.place(values))
    want = np.zeros((6, 32))
    want[[4, 0, 1]] = values
    return [Result(target, want)]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _elementwise(name: str, meaning: Callable[[np.ndarray], np.ndarray], *arguments: Any) -> None:
    @case(name, *arguments)
    def run(given: Given) -> list[Result]:
        x, values = given.floats(5, 32)
        # A term of a gelu or silu is x itself: where the factor is small, its error is relative to 1, not to it.
        return [Result(getattr(given.ops, name)(x, *arguments), meaning(values), np.maximum(np.abs(values), 2.0**-6))]


_elementwise("silu", lambda x: x * _sigmoid(x))
_elementwise("gelu", _gelu_tanh, "tanh")
_elementwise("relu", lambda x: np.maximum(x, 0))


@case("gelu", "none")
def gelu(given: Given) -> list[Result]:
    x, values = given.floats(5, 32)
    # erf by its series, which converges quickly for |x| / sqrt(2) below 4
    z = np.clip(values, -5, 5) / np.sqrt(2)
    term, total = z.copy(), z.copy()
    for n in range(1, 80):
        term = -term * z * z / n
        total += term / (2 * n + 1)
    want = values / 2 * (1 + 2 / np.sqrt(np.pi) * total)
    return [Result(given.ops.gelu(x, "none"), want, np.maximum(np.abs(values), 2.0**-6))]


@case("tanh", dtypes=(ms.float32,))
def tanh(given: Given) -> list[Result]:
    x, values = given.floats(5, 32)
    return [Result(given.ops.tanh(x), np.tanh(values), unit=APPROXIMATED)]


@case("sigmoid")
def sigmoid(given: Given) -> list[Result]:
    x, values = given.floats(5, 32)
    return [Result(given.ops.sigmoid(x), _sigmoid(values))]


@case("swiglu")
def swiglu(given: Given) -> list[Result]:
    x, values = given.floats(5, 64)
    gate, up = np.split(values, 2, -1)
    return [Result(given.ops.swiglu(x), gate * _sigmoid(gate) * up, np.abs(gate * up))]


@case("rms_norm")
def rms_norm(given: Given) -> list[Result]:
    (x, values), (gamma, scale) = given.floats(5, 64), given.floats(64)
    want = values / np.sqrt(np.mean(values**2, -1, keepdims=True) + 1e-6) * scale
    return [Result(given.ops.rms_norm(x, gamma, 1e-6), want)]


@case("add_rms_norm")
def add_rms_norm(given: Given) -> list[Result]:
    (x, a), (y, b), (gamma, scale) = (given.floats(*shape) for shape in ((5, 64), (5, 64), (64,)))
    length = np.sqrt(np.mean((a + b) ** 2, -1, keepdims=True) + 1e-6)
    normed, total = given.ops.add_rms_norm(x, y, gamma, 1e-6)
    terms = np.abs(a) + np.abs(b)
    return [Result(normed, (a + b) / length * scale, terms / length * np.abs(scale)), Result(total, a + b, terms)]


@case("layer_norm")
def layer_norm(given: Given) -> list[Result]:
    (x, values), (gamma, scale), (beta, shift) = (given.floats(*shape) for shape in ((5, 64), (64,), (64,)))
    mean, spread = values.mean(-1, keepdims=True), np.sqrt(values.var(-1, keepdims=True) + 1e-5)
    terms = (np.abs(values) + np.abs(mean)) / spread * np.abs(scale) + np.abs(shift)
    return [Result(given.ops.layer_norm(x, gamma, beta, 1e-5), (values - mean) / spread * scale + shift, terms)]
