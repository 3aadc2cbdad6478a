"""Gated activations, by their name in config.json."""

from mindspore import Tensor, nn

from vllm_ms_models import kernels


class SiluAndMul(nn.Cell):
    """`silu(gate) * up` (SwiGLU; Shazeer, 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = kernels.get()

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.kernels.silu_and_mul(gate, up)


class GeluAndMul(nn.Cell):
    """`gelu(gate) * up`, exact (erf) or by the tanh approximation."""

    def __init__(self, approximate: bool) -> None:
        super().__init__()
        self.approximate = approximate
        self.kernels = kernels.get()

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.kernels.gelu_and_mul(gate, up, self.approximate)


def gated_activation(name: str) -> nn.Cell:
    """The layer of config.json's `hidden_act`; ValueError for one that is not implemented."""
    if name in ("silu", "swish"):
        return SiluAndMul()
    if name in ("gelu", "gelu_pytorch_tanh", "gelu_new"):
        return GeluAndMul(approximate=name != "gelu")
    raise ValueError(
        f"Activation {name!r} (hidden_act in config.json) is not supported; "
        "supported are silu, swish, gelu, gelu_pytorch_tanh and gelu_new."
    )
