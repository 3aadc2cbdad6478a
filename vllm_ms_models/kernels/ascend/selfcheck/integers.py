"""Operators of int8 on tiny inputs, and in NumPy what they mean. **Not run on hardware.**"""

import mindspore as ms
import numpy as np

from vllm_ms_models.kernels.ascend.selfcheck.cases import UNITS, Given, Result, case


@case("quantize")
def quantize(given: Given) -> list[Result]:
    x, values = given.floats(5, 64)
    factors = given.rounded(given.rng.uniform(10, 60, 64))
    got = given.ops.quantize(x, given.place(factors), given.place(given.rounded(np.full(64, 3))))
    products = values * factors.astype(np.float64)
    return [Result(got, np.clip(products + 3, -128, 127), np.abs(products) + 3, 0.5, UNITS[given.dtype])]


@case("quantize_by_token")
def quantize_by_token(given: Given) -> list[Result]:
    x, values = given.floats(5, 64)
    scales = np.abs(values).max(-1) / 127
    got, found = given.ops.quantize_by_token(x)
    return [Result(got, values / scales[:, None], None, 0.5, UNITS[ms.float32]), Result(found, scales)]


def _quant_matmul(given: Given, by_token: bool) -> list[Result]:
    x, w = (given.rng.integers(-127, 128, shape).astype(np.int8) for shape in ((3, 64), (48, 64)))
    scales = given.rng.uniform(1e-4, 1e-3, 48).astype(np.float32)
    tokens = given.rng.uniform(0.5, 1, 3).astype(np.float32)
    bias = None if by_token else given.rng.integers(-500, 500, 48).astype(np.int32)
    bits = given.dtype == ms.float16 and not by_token
    undo = scales.view(np.uint32).astype(np.int64) if bits else scales
    got = given.ops.quant_matmul(
        given.place(x),
        given.place(w),
        given.place(undo),
        None if bias is None else given.place(bias),
        given.place(tokens) if by_token else None,
        given.dtype,
    )
    sums = x.astype(np.float64) @ w.astype(np.float64).T + (0 if bias is None else bias)
    return [Result(got, sums * scales * (tokens[:, None] if by_token else 1))]


@case("quant_matmul", "scales of tokens")
def quant_matmul_by_token(given: Given) -> list[Result]:
    return _quant_matmul(given, by_token=True)


@case("quant_matmul", "one scale, a bias")
def quant_matmul(given: Given) -> list[Result]:
    return _quant_matmul(given, by_token=False)
