"""Llama 2, 3, 3.1 and 3.2 (Touvron et al., 2023; Llama team, 2024), and Mistral, which adds a window."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.registry import register_model


@register_model("LlamaForCausalLM", "MistralForCausalLM")
class LlamaForCausalLM(CausalLM):
    """Llama with its language-model head; `config` is transformers' LlamaConfig or MistralConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        hidden, size, act = config.hidden_size, config.intermediate_size, config.hidden_act
        bias, mlp_bias = getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False)
        window = getattr(config, "sliding_window", None)  # Mistral's, the same for all layers
        rotary = RotaryEmbedding(config, context)

        def layer(_: int, prefix: str) -> PreNormLayer:
            name = f"{prefix}.self_attn"
            attention = SelfAttention(config, rotary, context, name, bias=bias, out_bias=bias, window=window)
            mlp = GatedMLP(f"{prefix}.mlp", hidden, size, act, context, mlp_bias)
            return PreNormLayer(prefix, hidden, config.rms_norm_eps, attention, mlp)

        super().__init__(Decoder(config, context, layer), config, context)
