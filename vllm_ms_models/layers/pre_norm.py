"""The layers of most decoders: norms before attention and feed-forward block, or on both sides of each."""

from mindspore import Tensor

from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.norm import AddRMSNorm, RMSNorm

NORMS = ("input_layernorm", "post_attention_layernorm")


class PreNormLayer(Layer):
    """Attention and feed-forward, each behind a norm, each added to the residual stream by the next norm.

    Both map `(hidden, batch)` to what is added; `norms` are the names of the norms in the checkpoint, `offset` as in
    `RMSNorm`.
    """

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        eps: float,
        attention: Layer,
        mlp: Layer,
        norms: tuple[str, str] = NORMS,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        before_attention, before_mlp = (f"{prefix}.{name}" for name in norms)
        self.input_layernorm = AddRMSNorm(before_attention, hidden_size, eps, offset)
        self.self_attn = attention
        self.post_attention_layernorm = AddRMSNorm(before_mlp, hidden_size, eps, offset)
        self.mlp = mlp

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.self_attn(hidden, batch), residual)
        return self.mlp(hidden, batch), residual


class SandwichNormLayer(Layer):
    """Attention and feed-forward, each between two norms, each added to the residual stream by the norm after.

    `norms` are the four norms' names in the checkpoint, in the order in which they come.
    """

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        eps: float,
        attention: Layer,
        mlp: Layer,
        norms: tuple[str, str, str, str],
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        first, second, third, fourth = (f"{prefix}.{name}" for name in norms)
        self.before_attention = AddRMSNorm(first, hidden_size, eps, offset)
        self.self_attn = attention
        self.after_attention = RMSNorm(second, hidden_size, eps, offset)
        self.before_mlp = AddRMSNorm(third, hidden_size, eps, offset)
        self.mlp = mlp
        self.after_mlp = RMSNorm(fourth, hidden_size, eps, offset)

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, residual = self.before_attention(hidden, residual)
        hidden = self.after_attention(self.self_attn(hidden, batch))
        hidden, residual = self.before_mlp(hidden, residual)
        return self.after_mlp(self.mlp(hidden, batch)), residual
