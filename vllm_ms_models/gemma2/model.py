"""Gemma (2024) and Gemma 2 (2024): scaled embeddings, norms with weights beside 1, GeGLU; Gemma 2 caps its scores."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm_ms_models.layers.logits import LogitsProcessor
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.norm import AddRMSNorm, RMSNorm
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.registry import register_model

OFFSET = 1.0  # of the weights of all norms


class GemmaAttention(Layer):
    """Self-attention of heads of any size. Gemma 2 says how scores are scaled and capped, and which layers slide."""

    def __init__(self, config: Any, layer: int, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        if config.use_bidirectional_attention:
            raise ValueError("use_bidirectional_attention in config.json is not supported; choose a causal model.")
        hidden, heads, head_size = config.hidden_size, config.num_attention_heads, rotary.head_size
        names = [f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        kv_heads, bias = config.num_key_value_heads, config.attention_bias
        self.qkv_proj = QKVParallelLinear(names, hidden, heads, kv_heads, head_size, context, bias)
        self.o_proj = RowParallelLinear(f"{prefix}.o_proj", heads * head_size, hidden, context, bias)
        self.rotary = rotary
        options: dict[str, Any] = {}
        if config.model_type == "gemma2":
            slides = config.layer_types[layer] == "sliding_attention"
            options["window"] = config.sliding_window if slides else None
            options["scale"], options["soft_cap"] = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
        own, own_kv = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.attention = Attention(f"{prefix}.attn", own, own_kv, head_size, **options)

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        query, key, value = self.qkv_proj(hidden, batch)
        self.rotary(query, key, batch.positions)
        return self.o_proj(self.attention(query, key, value, batch), batch)


class GemmaDecoderLayer(Layer):
    """Attention and MLP, each behind a norm, each added to the residual stream by the next norm."""

    def __init__(self, config: Any, layer: int, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = AddRMSNorm(f"{prefix}.input_layernorm", hidden, eps, OFFSET)
        self.self_attn = GemmaAttention(config, layer, rotary, context, f"{prefix}.self_attn")
        self.post_attention_layernorm = AddRMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps, OFFSET)
        self.mlp = GatedMLP(f"{prefix}.mlp", hidden, config.intermediate_size, config.hidden_act, context)

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.self_attn(hidden, batch), residual)
        return self.mlp(hidden, batch), residual


class Gemma2DecoderLayer(Layer):
    """Attention and MLP, each between two norms, each added to the residual stream by the norm after."""

    def __init__(self, config: Any, layer: int, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = AddRMSNorm(f"{prefix}.input_layernorm", hidden, eps, OFFSET)
        self.self_attn = GemmaAttention(config, layer, rotary, context, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps, OFFSET)
        self.pre_feedforward_layernorm = AddRMSNorm(f"{prefix}.pre_feedforward_layernorm", hidden, eps, OFFSET)
        self.mlp = GatedMLP(f"{prefix}.mlp", hidden, config.intermediate_size, config.hidden_activation, context)
        self.post_feedforward_layernorm = RMSNorm(f"{prefix}.post_feedforward_layernorm", hidden, eps, OFFSET)

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.post_attention_layernorm(self.self_attn(hidden, batch))
        hidden, residual = self.pre_feedforward_layernorm(hidden, residual)
        return self.post_feedforward_layernorm(self.mlp(hidden, batch)), residual


def decoder(config: Any, context: ModelContext, layer_class: type[Layer]) -> Decoder:
    rotary = RotaryEmbedding(config, context)
    return Decoder(
        config,
        context,
        lambda layer, prefix: layer_class(config, layer, rotary, context, prefix),
        embedding_scale=config.hidden_size**0.5,
        make_norm=lambda name: AddRMSNorm(name, config.hidden_size, config.rms_norm_eps, OFFSET),
    )


@register_model("GemmaForCausalLM")
class GemmaForCausalLM(CausalLM):
    """Gemma with its language-model head; `config` is transformers' GemmaConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        super().__init__(decoder(config, context, GemmaDecoderLayer), config, context)


@register_model("Gemma2ForCausalLM")
class Gemma2ForCausalLM(CausalLM):
    """Gemma 2 with its language-model head; `config` is transformers' Gemma2Config."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        logits = LogitsProcessor(soft_cap=config.final_logit_softcapping)
        super().__init__(decoder(config, context, Gemma2DecoderLayer), config, context, logits)
