"""Feed-forward blocks: the gated one of most decoders, and the plain one of encoders, vision and older decoders."""

from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.layers.activation import plain_activation
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import ColumnParallelLinear, GatedColumnParallelLinear, RowParallelLinear


class GatedMLP(Layer):
    """`down(activation(gate(x)) * up(x))`, `[tokens, hidden]` -> `[tokens, hidden]`.

    `reduce` is that of the RowParallelLinear at the end. `names` are gate, up and down in the checkpoint, or, where it
    has gate and up in one matrix, that and down.
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
        names: tuple[str, str, str] | tuple[str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        gate, up, down = f"{prefix}.{names[0]}", f"{prefix}.{names[1]}", f"{prefix}.{names[-1]}"
        gate_up = (gate, up) if len(names) == 3 else gate
        self.gate_up_proj = GatedColumnParallelLinear(
            gate_up, hidden_size, intermediate_size, hidden_act, context, bias
        )
        self.down_proj = RowParallelLinear(down, intermediate_size, hidden_size, context, bias, reduce)

    def construct(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        return self.down_proj(self.gate_up_proj(x, batch), batch)


class MLP(Layer):
    """`down(activation(up(x)))`, `[tokens, hidden]` -> `[tokens, out_size]` (default: `hidden_size`).

    `names` are those of up and down in the checkpoint, such as `...fc1` and `...fc2`; `hidden_act` is the activation's
    name in config.json.
    """

    def __init__(
        self,
        names: tuple[str, str],
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        context: ModelContext,
        bias: bool = True,
        out_size: int | None = None,
    ) -> None:
        super().__init__()
        up, down = names
        self.up_proj = ColumnParallelLinear(up, hidden_size, intermediate_size, context, bias)
        self.down_proj = RowParallelLinear(down, intermediate_size, out_size or hidden_size, context, bias)
        self.activation = plain_activation(hidden_act)
        self.kernels = kernels.get()

    def construct(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        return self.down_proj(self.kernels.activate(self.up_proj(x, batch), self.activation), batch)
