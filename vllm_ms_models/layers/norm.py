"""Normalisation, in float32.

RMSNorm (Zhang and Sennrich, 2019) is `x / sqrt(mean(x^2) + eps) * weight`, LayerNorm (Ba, Kiros and Hinton, 2016)
`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`.
"""

from collections.abc import Iterator

import numpy as np
from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.layers.layer import Layer


class RMSNorm(Layer):
    """Normalises the last axis, of `size` features; or, of a multiple of them, each head of `size` by itself.

    `offset` is added to the stored weight (Gemma's is the distance from 1).
    """

    def __init__(self, name: str, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.name = f"{name}.weight"
        self.eps = eps
        self.offset = offset
        self.kernels = kernels.get()
        self.weight = Tensor.from_numpy(np.ones(size, np.float32))

    def slots(self) -> Iterator[Slot]:
        def load(source: np.ndarray) -> None:
            target = self.weight.asnumpy()  # shares memory with the tensor
            target[...] = source
            target += self.offset

        yield Slot(self.name, self.weight.shape, load)

    def construct(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


class AddRMSNorm(RMSNorm):
    """Adds `x` to the residual stream, maybe in place, and normalises the sum: (normed, residual).

    Without a residual, `x` starts the stream.
    """

    def construct(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if residual is None:
            return self.kernels.rms_norm(x, self.weight, self.eps), x
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(Layer):
    """Normalises the last axis, of `size` features.

    Without `affine` the checkpoint has neither weight nor bias; without `bias`, a weight only.
    """

    def __init__(self, name: str, size: int, eps: float = 1e-5, affine: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels.get()
        self.weight = Tensor.from_numpy(np.ones(size, np.float32))
        self.bias = Tensor.from_numpy(np.zeros(size, np.float32))
        stored = {f"{name}.weight": self.weight, f"{name}.bias": self.bias}
        self.stored = dict(list(stored.items())[: affine * (1 + bias)])

    def slots(self) -> Iterator[Slot]:
        for name, tensor in self.stored.items():

            def load(source: np.ndarray, tensor: Tensor = tensor) -> None:
                tensor.asnumpy()[...] = source  # shares memory with the tensor

            yield Slot(name, tensor.shape, load)

    def construct(self, x: Tensor) -> Tensor:
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)


class AddLayerNorm(LayerNorm):
    """As AddRMSNorm: (normed, residual)."""

    def construct(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if residual is None:
            return self.kernels.layer_norm(x, self.weight, self.bias, self.eps), x
        return self.kernels.add_layer_norm(x, residual, self.weight, self.bias, self.eps)
