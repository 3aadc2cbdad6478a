"""GLM-4.5 and 4.6 (GLM team, 2025): grouped-query attention, and experts that are chosen as DeepSeek-V3's are."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.moe import MoE, noaux_tc
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.prediction import prediction_tensors
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention, head_norms
from vllm_ms_models.registry import register_model


def attention(config: Any, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> SelfAttention:
    """With `use_qk_norm`, a norm of each head's query and key, before they rotate."""
    norms = head_norms(config, rotary, prefix) if config.use_qk_norm else None
    return SelfAttention(config, rotary, context, prefix, bias=config.attention_bias, norms=norms)


def feed_forward(config: Any, layer: int, context: ModelContext, prefix: str) -> GatedMLP | MoE:
    """A dense block in the first layers, experts in all others, with one shared block."""
    hidden, act = config.hidden_size, config.hidden_act
    if layer < config.first_k_dense_replace:
        return GatedMLP(prefix, hidden, config.intermediate_size, act, context)
    size, experts = config.moe_intermediate_size, config.n_routed_experts
    scale, shared = config.routed_scaling_factor, config.n_shared_experts
    routing = noaux_tc(config.num_experts_per_tok, config.n_group, config.topk_group, scale, config.norm_topk_prob)
    shared_size = size * shared if shared else None
    return MoE(prefix, hidden, size, experts, routing, act, context, shared_size, correction_bias=True)


@register_model("Glm4MoeForCausalLM")
class Glm4MoeForCausalLM(CausalLM):
    """GLM-4.5 with its language-model head; `config` is transformers' Glm4MoeConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        rotary = RotaryEmbedding(config, context)

        def layer(number: int, prefix: str) -> PreNormLayer:
            attend = attention(config, rotary, context, f"{prefix}.self_attn")
            mlp = feed_forward(config, number, context, f"{prefix}.mlp")
            return PreNormLayer(prefix, config.hidden_size, config.rms_norm_eps, attend, mlp)

        super().__init__(Decoder(config, context, layer), config, context)
        self.ignored = prediction_tensors(config)
