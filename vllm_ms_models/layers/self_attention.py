"""Self-attention with grouped KV heads and rotated positions, which most decoders have with small differences."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.attention import Attention, SinkAttention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm_ms_models.layers.norm import RMSNorm
from vllm_ms_models.layers.rotary import RotaryEmbedding

SEPARATE = ("q_proj", "k_proj", "v_proj")
FUSED = "qkv_proj"


def head_norms(config: Any, rotary: RotaryEmbedding, prefix: str, offset: float = 0.0) -> tuple[RMSNorm, RMSNorm]:
    """For `SelfAttention`: each head of queries and keys by itself, which keeps their products small (Qwen3)."""
    size, eps = rotary.head_size, config.rms_norm_eps
    return RMSNorm(f"{prefix}.q_norm", size, eps, offset), RMSNorm(f"{prefix}.k_norm", size, eps, offset)


class SelfAttention(Layer):
    """`[tokens, hidden]` -> `[tokens, hidden]`; numbers of heads and the hidden size are those of `config`.

    `qkv` and `out` name the projections in the checkpoint, `bias` and `out_bias` say whether they have biases;
    `by_heads` as in `QKVParallelLinear`. `scale` is that of the softmax (default: 1 / sqrt(head size)), `window` and
    `soft_cap` as in `Attention`. `norms` are of queries and keys, before they rotate (`head_norms`); without `rotates`
    they do not, and positions only say what is earlier. `sinks` names the tensor of a `SinkAttention`.
    """

    def __init__(
        self,
        config: Any,
        rotary: RotaryEmbedding,
        context: ModelContext,
        prefix: str,
        *,
        qkv: tuple[str, str, str] | str = SEPARATE,
        by_heads: bool = False,
        out: str = "o_proj",
        bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        norms: tuple[Layer, Layer] | None = None,
        rotates: bool = True,
        sinks: str | None = None,
    ) -> None:
        super().__init__()
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        size = rotary.head_size
        names = f"{prefix}.{qkv}" if isinstance(qkv, str) else [f"{prefix}.{name}" for name in qkv]
        self.qkv_proj = QKVParallelLinear(names, hidden, heads, kv_heads, size, context, bias, by_heads)
        self.has_norms = norms is not None
        if norms is not None:
            self.q_norm, self.k_norm = norms
        self.rotary = rotary if rotates else None
        own = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap}
        self.attention: Attention
        if sinks is None:
            self.attention = Attention(f"{prefix}.attn", *own, size, **options)
        else:
            self.attention = SinkAttention(f"{prefix}.attn", *own, size, f"{prefix}.{sinks}", context, **options)
        self.o_proj = RowParallelLinear(f"{prefix}.{out}", heads * size, hidden, context, out_bias)

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        query, key, value = self.qkv_proj(hidden, batch)
        if self.has_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary is not None:
            query, key = self.rotary(query, key, batch["positions"])
        return self.o_proj(self.attention(query, key, value, batch), batch)
