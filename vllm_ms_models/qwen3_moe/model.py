"""Qwen3-MoE (Yang et al., 2025): Qwen3 in which most feed-forward blocks are a mixture of experts."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.moe import MoE, softmax_top_k
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention, head_norms
from vllm_ms_models.registry import register_model


def feed_forward(config: Any, layer: int, context: ModelContext, prefix: str) -> GatedMLP | MoE:
    """Experts, in every layer or every n-th, except in some layers by their numbers."""
    sparse = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
    if layer in config.mlp_only_layers or not sparse:
        return GatedMLP(prefix, config.hidden_size, config.intermediate_size, config.hidden_act, context)
    routing = softmax_top_k(config.num_experts_per_tok, config.norm_topk_prob)
    size, experts = config.moe_intermediate_size, config.num_experts
    return MoE(prefix, config.hidden_size, size, experts, routing, config.hidden_act, context)


@register_model("Qwen3MoeForCausalLM")
class Qwen3MoeForCausalLM(CausalLM):
    """Qwen3-MoE with its language-model head; `config` is transformers' Qwen3MoeConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        rotary, bias, window = RotaryEmbedding(config, context), config.attention_bias, config.sliding_window

        def layer(number: int, prefix: str) -> PreNormLayer:
            name = f"{prefix}.self_attn"
            norms = head_norms(config, rotary, name)
            attention = SelfAttention(
                config, rotary, context, name, bias=bias, out_bias=bias, window=window, norms=norms
            )
            mlp = feed_forward(config, number, context, f"{prefix}.mlp")
            return PreNormLayer(prefix, config.hidden_size, config.rms_norm_eps, attention, mlp)

        super().__init__(Decoder(config, context, layer), config, context)
