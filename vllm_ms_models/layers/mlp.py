"""The gated feed-forward block of most decoders."""

from mindspore import Tensor, nn

from vllm_ms_models.layers.activation import gated_activation
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.linear import MergedColumnParallelLinear, RowParallelLinear


class GatedMLP(nn.Cell):
    """`down(activation(gate(x)) * up(x))`, `[tokens, hidden]` -> `[tokens, hidden]`."""

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        context: ModelContext,
        bias: bool = False,
    ) -> None:
        super().__init__()
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        sizes = [intermediate_size, intermediate_size]
        self.gate_up_proj = MergedColumnParallelLinear(names, hidden_size, sizes, context, bias)
        self.activation = gated_activation(hidden_act)
        self.down_proj = RowParallelLinear(f"{prefix}.down_proj", intermediate_size, hidden_size, context, bias)

    def construct(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)
        return self.down_proj(self.activation(gate, up))
