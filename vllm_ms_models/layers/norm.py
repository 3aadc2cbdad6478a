"""Root-mean-square normalisation (Zhang and Sennrich, 2019): `x / sqrt(mean(x^2) + eps) * weight`, in float32."""

from collections.abc import Iterator

import numpy as np
from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.layers.layer import Layer


class RMSNorm(Layer):
    """Normalises the last axis, of `size` features."""

    def __init__(self, name: str, size: int, eps: float) -> None:
        super().__init__()
        self.name = f"{name}.weight"
        self.eps = eps
        self.kernels = kernels.get()
        self.weight = Tensor.from_numpy(np.ones(size, np.float32))

    def slots(self) -> Iterator[Slot]:
        def load(source: np.ndarray) -> None:
            self.weight.asnumpy()[...] = source  # shares memory with the tensor

        yield Slot(self.name, self.weight.shape, load)

    def construct(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


class AddRMSNorm(RMSNorm):
    """Adds `x` to the residual stream, in place, and normalises the sum: (normed, residual).

    Without a residual, `x` starts the stream.
    """

    def construct(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if residual is None:
            return self.kernels.rms_norm(x, self.weight, self.eps), x
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)


class HeadRMSNorm(RMSNorm):
    """Normalises each head, of `size` features: `[tokens, heads * size]` -> the same."""

    def construct(self, x: Tensor) -> Tensor:
        tokens, features = x.shape
        heads = x.view(tokens, features // self.weight.shape[0], self.weight.shape[0])
        return self.kernels.rms_norm(heads, self.weight, self.eps).view(tokens, features)
