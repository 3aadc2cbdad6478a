"""Granite 3 (IBM, 2024): Llama with factors on the embedding, attention scores, residual sums and logits."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.scaled import ScaledDecoder, ScaledLogits
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.registry import register_model


@register_model("GraniteForCausalLM")
class GraniteForCausalLM(CausalLM):
    """Granite with its language-model head; `config` is transformers' GraniteConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        hidden, size, act = config.hidden_size, config.intermediate_size, config.hidden_act
        bias, scale = config.attention_bias, config.attention_multiplier
        rotary = RotaryEmbedding(config, context)

        def layer(_: int, prefix: str, eps: float) -> PreNormLayer:
            name = f"{prefix}.self_attn"
            attention = SelfAttention(config, rotary, context, name, bias=bias, out_bias=bias, scale=scale)
            mlp = GatedMLP(f"{prefix}.mlp", hidden, size, act, context, config.mlp_bias)
            return PreNormLayer(prefix, hidden, eps, attention, mlp)

        model = ScaledDecoder(config, context, layer, config.embedding_multiplier, config.residual_multiplier)
        super().__init__(model, config, context, ScaledLogits(1 / config.logits_scaling, hidden))
