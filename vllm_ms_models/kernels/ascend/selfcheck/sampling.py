"""Operators that choose tokens, on tiny inputs, and in NumPy what they mean. **Not run on hardware.**"""

import mindspore as ms
import numpy as np

from vllm_ms_models.kernels.ascend.selfcheck.cases import APPROXIMATED, Given, Result, case

FLOAT32 = (ms.float32,)


@case("argmax", dtypes=FLOAT32)
def argmax(given: Given) -> list[Result]:
    x, values = given.floats(5, 300)
    tied = np.zeros((2, 300), np.float32)
    tied[:, [7, 290]] = 1  # the first of equal ones
    return [
        Result(given.ops.argmax(x), values.argmax(-1)),
        Result(given.ops.argmax(given.place(tied)), np.array([7, 7])),
    ]


@case("sort", dtypes=FLOAT32)
def sort(given: Given) -> list[Result]:
    values = (given.rng.permutation(600).reshape(2, 300) // 2).astype(np.float32)  # each number twice
    sorted_values, places = given.ops.sort(given.place(values))
    want = np.argsort(-values, axis=-1, kind="stable")
    return [Result(sorted_values, np.take_along_axis(values, want, -1).astype(np.float64)), Result(places, want)]


@case("softmax", dtypes=FLOAT32)
def softmax(given: Given) -> list[Result]:
    x, values = given.floats(5, 300)
    shares = np.exp(values - values.max(-1, keepdims=True))
    return [Result(given.ops.softmax(x), shares / shares.sum(-1, keepdims=True), unit=APPROXIMATED)]


@case("cumsum", dtypes=FLOAT32)
def cumsum(given: Given) -> list[Result]:
    x, values = given.floats(5, 300)
    sums = np.cumsum(values, -1)
    # A rounding for each sum before, of numbers no larger than the largest of them, and in all directions.
    terms = np.maximum.accumulate(np.abs(sums), -1) * np.sqrt(np.arange(1, 301))
    return [Result(given.ops.cumsum(x), sums, terms)]
