"""The gated feed-forward block of most decoders."""

from mindspore import Tensor

from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import GatedColumnParallelLinear, RowParallelLinear


class GatedMLP(Layer):
    """`down(activation(gate(x)) * up(x))`, `[tokens, hidden]` -> `[tokens, hidden]`.

    `reduce` is that of the RowParallelLinear at the end.
    """

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        context: ModelContext,
        bias: bool = False,
        reduce: bool = True,
    ) -> None:
        super().__init__()
        names = f"{prefix}.gate_proj", f"{prefix}.up_proj"
        self.gate_up_proj = GatedColumnParallelLinear(names, hidden_size, intermediate_size, hidden_act, context, bias)
        self.down_proj = RowParallelLinear(f"{prefix}.down_proj", intermediate_size, hidden_size, context, bias, reduce)

    def construct(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        return self.down_proj(self.gate_up_proj(x, batch), batch)
