"""Operators that MindSpore has for Ascend only, spelled with what there is on CPUs too.

mindone's modules get them in place of the operators' own names, on CPUs and nowhere else. Activations and norms are the
kernels', which take every dtype and are more exact than MindSpore's operators on CPU (its tanh is off by 1e-4).
"""

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from vllm_ms_models import kernels


def _by_rows(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of `x` as contiguous `[rows, features]`, which is all that kernels take."""
    return function(x.contiguous().view(-1, x.shape[-1])).view(x.shape)


def arange(start: float, end: float | None = None, step: float = 1, *, dtype: ms.Type | None = None) -> Tensor:
    """Of plain numbers; int64 unless one of them is a float."""
    array: Any = np.arange(*((0, start) if end is None else (start, end)), step)  # type: ignore[call-overload]
    made = Tensor.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
    return made if dtype is None else made.astype(dtype)


def full(size: int | tuple[int, ...], fill_value: float, *, dtype: ms.Type | None = None) -> Tensor:
    return ops.full(size if isinstance(size, tuple) else (size,), fill_value, dtype=dtype)


def zeros_like(input: Tensor, *, dtype: ms.Type | None = None) -> Tensor:
    return ops.zeros(input.shape, dtype or input.dtype)


def ones_like(input: Tensor, *, dtype: ms.Type | None = None) -> Tensor:
    return ops.ones(input.shape, dtype or input.dtype)


def stack(tensors: list[Tensor] | tuple[Tensor, ...], dim: int = 0) -> Tensor:
    return ops.stack(tensors, dim)


def repeat_interleave(input: Tensor, repeats: int, dim: int = -1) -> Tensor:
    """Each slice along `dim` so many times in a row."""
    axis = dim % input.ndim
    shape = (*input.shape[: axis + 1], repeats, *input.shape[axis + 1 :])
    merged = (*input.shape[:axis], input.shape[axis] * repeats, *input.shape[axis + 1 :])
    return input.unsqueeze(axis + 1).broadcast_to(shape).reshape(merged)


def tanh(input: Tensor) -> Tensor:
    """As `2 / (1 + exp(-2x)) - 1`, which is off by 2e-6."""
    return (2.0 / (1.0 + (input.float() * -2.0).exp()) - 1.0).to(input.dtype)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    return _by_rows(input, lambda rows: kernels.get().activate(rows, "silu"))


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    name = "gelu_tanh" if approximate == "tanh" else "gelu"
    return _by_rows(input, lambda rows: kernels.get().activate(rows, name))


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    return _by_rows(input, lambda rows: kernels.get().activate(rows, "relu"))


def softmax(input: Tensor, dim: int, *, dtype: ms.Type | None = None) -> Tensor:
    """In float32."""
    return ops.softmax(input.float(), dim).to(dtype or input.dtype)


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, None]:
    """Of the last axis. The second result, for training, is not computed."""
    return _by_rows(x, lambda rows: kernels.get().rms_norm(rows, gamma.float(), epsilon)), None


def layer_norm(
    input: Tensor,
    normalized_shape: int | tuple[int, ...] | list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Of the last axis."""
    size = input.shape[-1]
    if tuple(np.atleast_1d(normalized_shape)) != (size,):
        raise ValueError(f"A LayerNorm over {normalized_shape} of {input.shape} is not supported on CPU.")
    factor = ops.ones(size, ms.float32) if weight is None else weight.float()
    addend = ops.zeros(size, ms.float32) if bias is None else bias.float()
    return _by_rows(input, lambda rows: kernels.get().layer_norm(rows, factor, addend, eps))


class SiLU(nn.Cell):
    """`mint.nn.SiLU`."""

    def construct(self, x: Tensor) -> Tensor:
        return silu(x)


class ReLU(nn.Cell):
    """`mint.nn.ReLU`."""

    def construct(self, x: Tensor) -> Tensor:
        return relu(x)


class LayerNorm(nn.Cell):
    """`mint.nn.LayerNorm` of the last axis."""

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dtype: ms.Type | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.eps = normalized_shape, eps
        size = int(np.prod(normalized_shape))
        self.weight = ms.Parameter(Tensor.from_numpy(np.ones(size, np.float32))) if elementwise_affine else None
        self.bias = ms.Parameter(Tensor.from_numpy(np.zeros(size, np.float32))) if elementwise_affine and bias else None

    def construct(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.shape, self.weight, self.bias, self.eps)


def spellings() -> dict[str, dict[str, Any]]:
    """Module of MindSpore -> its operators, as mindone sees them on a CPU."""
    functions = {"silu": silu, "gelu": gelu, "relu": relu, "softmax": softmax, "layer_norm": layer_norm}
    return {
        "mindspore.mint": {
            "arange": arange,
            "full": full,
            "zeros_like": zeros_like,
            "ones_like": ones_like,
            "repeat_interleave": repeat_interleave,
            "stack": stack,
            "tanh": tanh,
            "softmax": softmax,
        },
        "mindspore.mint.nn": {"SiLU": SiLU, "ReLU": ReLU, "LayerNorm": LayerNorm},
        "mindspore.mint.nn.functional": functions,
        "mindspore.ops": {"arange": arange, "rms_norm": rms_norm, "gelu": gelu, "silu": silu, "softmax": softmax},
    }
