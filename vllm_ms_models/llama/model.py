"""Llama 2, 3, 3.1 and 3.2 (Touvron et al., 2023; Llama team, 2024), and Mistral, which adds a window."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.norm import AddRMSNorm
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.registry import register_model


class LlamaAttention(Layer):
    """Self-attention; `window` (Mistral) is the same for all layers."""

    def __init__(self, config: Any, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, heads, head_size = config.hidden_size, config.num_attention_heads, rotary.head_size
        bias = getattr(config, "attention_bias", False)
        names = [f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        kv_heads = config.num_key_value_heads
        self.qkv_proj = QKVParallelLinear(names, hidden, heads, kv_heads, head_size, context, bias)
        self.o_proj = RowParallelLinear(f"{prefix}.o_proj", heads * head_size, hidden, context, bias)
        self.rotary = rotary
        window = getattr(config, "sliding_window", None)
        self.attention = Attention(
            f"{prefix}.attn", self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, head_size, window=window
        )

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        query, key, value = self.qkv_proj(hidden, batch)
        self.rotary(query, key, batch.positions)
        return self.o_proj(self.attention(query, key, value, batch), batch)


class LlamaDecoderLayer(Layer):
    """Attention and MLP, each behind a norm, each added to the residual stream by the next norm."""

    def __init__(self, config: Any, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        mlp_bias = getattr(config, "mlp_bias", False)
        self.input_layernorm = AddRMSNorm(f"{prefix}.input_layernorm", hidden, eps)
        self.self_attn = LlamaAttention(config, rotary, context, f"{prefix}.self_attn")
        self.post_attention_layernorm = AddRMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps)
        self.mlp = GatedMLP(f"{prefix}.mlp", hidden, config.intermediate_size, config.hidden_act, context, mlp_bias)

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.self_attn(hidden, batch), residual)
        return self.mlp(hidden, batch), residual


@register_model("LlamaForCausalLM", "MistralForCausalLM")
class LlamaForCausalLM(CausalLM):
    """Llama with its language-model head; `config` is transformers' LlamaConfig or MistralConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        rotary = RotaryEmbedding(config, context)
        model = Decoder(config, context, lambda _, prefix: LlamaDecoderLayer(config, rotary, context, prefix))
        super().__init__(model, config, context)
