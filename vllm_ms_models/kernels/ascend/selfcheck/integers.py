"""Operators of int8 on tiny inputs, and in NumPy what they mean. **Not run on hardware.**"""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models.kernels.ascend.selfcheck.cases import NUMPY, UNITS, Result, case, floats


@case("quantize")
def quantize(ops: Any, dtype: Any, rng: np.random.Generator) -> list[Result]:
    x, values = floats(rng, (5, 64), dtype)
    factors = rng.uniform(10, 60, 64).astype(NUMPY[dtype])
    got = ops.quantize(x, Tensor.from_numpy(factors), Tensor.from_numpy(np.full(64, 3).astype(NUMPY[dtype])))
    products = values * factors.astype(np.float64)
    return [Result(got, np.clip(products + 3, -128, 127), np.abs(products) + 3, 0.5, UNITS[dtype])]


@case("quantize_by_token")
def quantize_by_token(ops: Any, dtype: Any, rng: np.random.Generator) -> list[Result]:
    x, values = floats(rng, (5, 64), dtype)
    scales = np.abs(values).max(-1) / 127
    got, found = ops.quantize_by_token(x)
    return [Result(got, values / scales[:, None], None, 0.5, UNITS[ms.float32]), Result(found, scales)]


def _quant_matmul(ops: Any, dtype: Any, rng: np.random.Generator, by_token: bool) -> list[Result]:
    x, w = (rng.integers(-127, 128, shape).astype(np.int8) for shape in ((3, 64), (48, 64)))
    scales = rng.uniform(1e-4, 1e-3, 48).astype(np.float32)
    tokens = rng.uniform(0.5, 1, 3).astype(np.float32)
    bias = None if by_token else rng.integers(-500, 500, 48).astype(np.int32)
    bits = dtype == ms.float16 and not by_token
    undo = scales.view(np.uint32).astype(np.int64) if bits else scales
    got = ops.quant_matmul(
        Tensor(x),
        Tensor(w),
        Tensor(undo),
        None if bias is None else Tensor(bias),
        Tensor(tokens) if by_token else None,
        dtype,
    )
    sums = x.astype(np.float64) @ w.astype(np.float64).T + (0 if bias is None else bias)
    return [Result(got, sums * scales * (tokens[:, None] if by_token else 1))]


@case("quant_matmul", "scales of tokens")
def quant_matmul_by_token(ops: Any, dtype: Any, rng: np.random.Generator) -> list[Result]:
    return _quant_matmul(ops, dtype, rng, by_token=True)


@case("quant_matmul", "one scale, a bias")
def quant_matmul(ops: Any, dtype: Any, rng: np.random.Generator) -> list[Result]:
    return _quant_matmul(ops, dtype, rng, by_token=False)
