"""The layer of most decoders: a norm before attention, another before the feed-forward block."""

from mindspore import Tensor

from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.norm import AddRMSNorm

NORMS = ("input_layernorm", "post_attention_layernorm")


class PreNormLayer(Layer):
    """Attention and feed-forward, each behind a norm, each added to the residual stream by the next norm.

    Both map `(hidden, batch)` to what is added; `norms` are the names of the norms in the checkpoint.
    """

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        eps: float,
        attention: Layer,
        mlp: Layer,
        norms: tuple[str, str] = NORMS,
    ) -> None:
        super().__init__()
        before_attention, before_mlp = (f"{prefix}.{name}" for name in norms)
        self.input_layernorm = AddRMSNorm(before_attention, hidden_size, eps)
        self.self_attn = attention
        self.post_attention_layernorm = AddRMSNorm(before_mlp, hidden_size, eps)
        self.mlp = mlp

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.self_attn(hidden, batch), residual)
        return self.mlp(hidden, batch), residual
