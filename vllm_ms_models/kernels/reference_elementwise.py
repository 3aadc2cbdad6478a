"""Norms and activations of the reference back end: float32 inside, rounded once."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from vllm_ms_models.kernels.reference_memory import cast


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`Kernels.rms_norm`."""
    size = weight.shape[0]
    if x.ndim == 0 or x.shape[-1] % size:
        raise ValueError(f"expected [..., {size}] or a multiple, got {x.shape}")
    if 0 in x.shape:
        return mint.empty(x.shape, dtype=x.dtype)
    wide = cast(x, ms.float32).reshape(-1, size)
    mean = ops.mean(ops.square(wide), -1, True)
    return cast((wide * ops.rsqrt(mean + eps) * weight).reshape(x.shape), x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`Kernels.layer_norm`."""
    if not x.shape[-1:] == weight.shape == bias.shape:
        raise ValueError(f"x is {x.shape}, the weight {weight.shape}, the bias {bias.shape}")
    if 0 in x.shape:
        return mint.empty(x.shape, dtype=x.dtype)
    wide = cast(x, ms.float32)
    off = wide - ops.mean(wide, -1, True)
    variance = ops.mean(ops.square(off), -1, True)
    return cast(off * ops.rsqrt(variance + eps) * weight + bias, x.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    """`Kernels.activate`."""
    if 0 in x.shape:
        return mint.empty(x.shape, dtype=x.dtype)
    return cast(_activated(cast(x, ms.float32), activation), x.dtype)


def gate_and_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`Kernels.silu_and_mul` and `gelu_and_mul`."""
    if gate.shape != up.shape:
        raise ValueError(f"gate is {gate.shape}, up {up.shape}")
    if 0 in gate.shape:
        return mint.empty(gate.shape, dtype=gate.dtype)
    wide, other = cast(gate, ms.float32), cast(up, ms.float32)
    if activation == "clamped_swiglu":
        wide, other = ops.where(wide > 7.0, 7.0, wide), ops.where(other > 7.0, 7.0, other)
        return cast(wide * sigmoid(wide * 1.702) * (ops.where(other < -7.0, -7.0, other) + 1.0), gate.dtype)
    return cast(_activated(wide, activation) * other, gate.dtype)


def sigmoid(x: Tensor) -> Tensor:
    """By the exponential: the Sigmoid operator is less exact on CPU."""
    return 1.0 / (ops.exp(-x) + 1.0)


def _activated(x: Tensor, activation: str) -> Tensor:
    """`0.5 (1 + tanh(z))` is the sigmoid of 2z, `0.5 (1 + erf(z))` is half of erfc(-z): nothing cancels."""
    if activation == "relu":
        return ops.where(x < 0, ops.zeros_like(x), x)
    if activation == "silu":
        return x * sigmoid(x)
    if activation == "quick_gelu":
        return x * sigmoid(x * 1.702)
    if activation == "gelu_tanh":
        return x * sigmoid((x + x * x * x * 0.044715) * (8.0 / np.pi) ** 0.5)
    if activation == "gelu":
        return x * (ops.erfc(x * -(0.5**0.5)) * 0.5)
    raise ValueError(f"there is no activation {activation!r}")
