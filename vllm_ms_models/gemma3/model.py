"""Gemma 3 (2025), its text part: as Gemma 2, with norms of queries and keys and an angle for each kind of layer."""

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


class Gemma3Attention(Layer):
    """Self-attention over a window or everything; a norm of each head's query and key keeps their products small."""

    def __init__(self, config: Any, kind: str, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, heads, head_size = config.hidden_size, config.num_attention_heads, rotary.head_size
        names = [f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        kv_heads, bias = config.num_key_value_heads, config.attention_bias
        self.qkv_proj = QKVParallelLinear(names, hidden, heads, kv_heads, head_size, context, bias)
        self.q_norm = RMSNorm(f"{prefix}.q_norm", head_size, config.rms_norm_eps, OFFSET)
        self.k_norm = RMSNorm(f"{prefix}.k_norm", head_size, config.rms_norm_eps, OFFSET)
        self.o_proj = RowParallelLinear(f"{prefix}.o_proj", heads * head_size, hidden, context, bias)
        self.rotary = rotary
        self.attention = Attention(
            f"{prefix}.attn",
            self.qkv_proj.num_heads,
            self.qkv_proj.num_kv_heads,
            head_size,
            config.query_pre_attn_scalar**-0.5,
            config.sliding_window if kind == "sliding_attention" else None,
        )

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        query, key, value = self.qkv_proj(hidden, batch)
        query, key = self.q_norm(query), self.k_norm(key)
        self.rotary(query, key, batch.positions)
        return self.o_proj(self.attention(query, key, value, batch), batch)


class Gemma3DecoderLayer(Layer):
    """Attention and MLP, each between two norms, each added to the residual stream by the norm after."""

    def __init__(self, config: Any, kind: str, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = AddRMSNorm(f"{prefix}.input_layernorm", hidden, eps, OFFSET)
        self.self_attn = Gemma3Attention(config, kind, rotary, context, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps, OFFSET)
        self.pre_feedforward_layernorm = AddRMSNorm(f"{prefix}.pre_feedforward_layernorm", hidden, eps, OFFSET)
        self.mlp = GatedMLP(f"{prefix}.mlp", hidden, config.intermediate_size, config.hidden_activation, context)
        self.post_feedforward_layernorm = RMSNorm(f"{prefix}.post_feedforward_layernorm", hidden, eps, OFFSET)

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.post_attention_layernorm(self.self_attn(hidden, batch))
        hidden, residual = self.pre_feedforward_layernorm(hidden, residual)
        return self.post_feedforward_layernorm(self.mlp(hidden, batch)), residual


@register_model("Gemma3ForCausalLM")
class Gemma3ForCausalLM(CausalLM):
    """Gemma 3 with its language-model head; `config` is transformers' Gemma3TextConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        for key in ("use_bidirectional_attention", "attn_logit_softcapping"):
            if getattr(config, key):
                raise ValueError(f"{key} in config.json is not supported for Gemma 3; choose a model without it.")
        kinds = config.layer_types
        rotary = {kind: RotaryEmbedding(config, context, layer_type=kind) for kind in sorted(set(kinds))}
        model = Decoder(
            config,
            context,
            lambda layer, prefix: Gemma3DecoderLayer(config, kinds[layer], rotary[kinds[layer]], context, prefix),
            embedding_scale=config.hidden_size**0.5,
            make_norm=lambda name: AddRMSNorm(name, config.hidden_size, config.rms_norm_eps, OFFSET),
        )
        super().__init__(model, config, context, LogitsProcessor(soft_cap=config.final_logit_softcapping))
