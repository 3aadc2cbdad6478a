"""Qwen3 (Yang et al., 2025): a pre-norm decoder with grouped-query attention whose queries and keys are normalised."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention, head_norms
from vllm_ms_models.registry import register_model


@register_model("Qwen3ForCausalLM")
class Qwen3ForCausalLM(CausalLM):
    """Qwen3 with its language-model head; `config` is transformers' Qwen3Config."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        hidden, size, act, bias = (
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            config.attention_bias,
        )
        rotary = RotaryEmbedding(config, context)

        def layer(number: int, prefix: str) -> PreNormLayer:
            name = f"{prefix}.self_attn"
            norms = head_norms(config, rotary, name)
            window = config.sliding_window if config.layer_types[number] == "sliding_attention" else None
            attention = SelfAttention(
                config, rotary, context, name, bias=bias, out_bias=bias, window=window, norms=norms
            )
            mlp = GatedMLP(f"{prefix}.mlp", hidden, size, act, context)
            return PreNormLayer(prefix, hidden, config.rms_norm_eps, attention, mlp)

        super().__init__(Decoder(config, context, layer), config, context)
