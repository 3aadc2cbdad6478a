"""OLMo 2 (OLMo team, 2024) and OLMo 3 (2025), which adds windows: norms behind each block and on queries and keys."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.norm import RMSNorm
from vllm_ms_models.layers.parallel_norm import ParallelRMSNorm
from vllm_ms_models.layers.post_norm import PostRMSNorm, add
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.registry import register_model


def attention(config: Any, layer: int, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> SelfAttention:
    """The norm of queries, and that of keys, is over all heads at once."""
    size, eps, group = rotary.head_size, config.rms_norm_eps, context.tensor_parallel
    norms = (
        ParallelRMSNorm(f"{prefix}.q_norm", config.num_attention_heads, size, eps, group),
        ParallelRMSNorm(f"{prefix}.k_norm", config.num_key_value_heads, size, eps, group),
    )
    window = config.sliding_window if layer_type(config, layer) == "sliding_attention" else None
    bias = config.attention_bias
    return SelfAttention(config, rotary, context, prefix, bias=bias, out_bias=bias, window=window, norms=norms)


def layer_type(config: Any, layer: int) -> str | None:
    """None for OLMo 2, which has one type of layer."""
    types = getattr(config, "layer_types", None)
    return types[layer] if types else None


class Olmo2DecoderLayer(Layer):
    """Attention and MLP, each before a norm: what it gives is added to the residual stream, which nothing normalises.

    The second sum is left to the next layer, or to the last norm.
    """

    def __init__(self, config: Any, layer: int, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = attention(config, layer, rotary, context, f"{prefix}.self_attn")
        self.post_attention_layernorm = PostRMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps)
        self.mlp = GatedMLP(f"{prefix}.mlp", hidden, config.intermediate_size, config.hidden_act, context)
        self.post_feedforward_layernorm = RMSNorm(f"{prefix}.post_feedforward_layernorm", hidden, eps)

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        stream = hidden if residual is None else add(hidden, residual, self.post_feedforward_layernorm.weight)
        stream = self.post_attention_layernorm(self.self_attn(stream, batch), stream)
        return self.post_feedforward_layernorm(self.mlp(stream, batch)), stream


@register_model("Olmo2ForCausalLM", "Olmo3ForCausalLM")
class Olmo2ForCausalLM(CausalLM):
    """OLMo with its language-model head; `config` is transformers' Olmo2Config or Olmo3Config."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        types = {layer_type(config, layer) for layer in range(config.num_hidden_layers)}
        rotaries = {kind: RotaryEmbedding(config, context, layer_type=kind) for kind in types}

        def layer(number: int, prefix: str) -> Olmo2DecoderLayer:
            return Olmo2DecoderLayer(config, number, rotaries[layer_type(config, number)], context, prefix)

        super().__init__(Decoder(config, context, layer), config, context)
