"""Multiplying hidden states by a number."""

import numpy as np
from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.layers.layer import Layer

# A norm's eps, beside which any mean of squares vanishes in float32, and the root of it. Both are powers of two, by
# which dividing and multiplying again changes no digit.
EPS, ROOT = 2.0**60, 2.0**30


class Scale(Layer):
    """`x * factor` of hidden states `[..., size]`, in float32 and rounded once to their dtype.

    By the kernel of RMSNorm, which divides by ROOT and multiplies by `factor * ROOT`: a product of MindSpore's on CPU
    takes bfloat16 30 to 80 times as long, and would round the factor first. Values must be below 2^17 in magnitude.
    """

    def __init__(self, factor: float, size: int) -> None:
        super().__init__()
        self.kernels = kernels.get()
        self.weight = Tensor.from_numpy(np.full(size, factor * ROOT, np.float32))

    def construct(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, EPS)
