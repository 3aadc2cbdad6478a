"""Mixtral (Jiang et al., 2024): a pre-norm decoder in which every feed-forward block is a mixture of experts."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.moe import ExpertNames, MoE, softmax_top_k
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.registry import register_model

EXPERT_NAMES = ExpertNames(gate_proj="w1", up_proj="w3", down_proj="w2")


@register_model("MixtralForCausalLM")
class MixtralForCausalLM(CausalLM):
    """Mixtral with its language-model head; `config` is transformers' MixtralConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        hidden, size, act = config.hidden_size, config.intermediate_size, config.hidden_act
        routing = softmax_top_k(config.num_experts_per_tok, renormalize=True)
        rotary = RotaryEmbedding(config, context)

        def layer(_: int, prefix: str) -> PreNormLayer:
            window = config.sliding_window  # the same for all layers
            attention = SelfAttention(config, rotary, context, f"{prefix}.self_attn", window=window)
            name, experts = f"{prefix}.block_sparse_moe", config.num_local_experts
            moe = MoE(name, hidden, size, experts, routing, act, context, names=EXPERT_NAMES)
            return PreNormLayer(prefix, hidden, config.rms_norm_eps, attention, moe)

        super().__init__(Decoder(config, context, layer), config, context)
