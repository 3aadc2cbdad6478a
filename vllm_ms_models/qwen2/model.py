"""Qwen2 and Qwen2.5 (Yang et al., 2024): a pre-norm decoder with grouped-query attention and biases on q, k and v."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.registry import register_model


@register_model("Qwen2ForCausalLM")
class Qwen2ForCausalLM(CausalLM):
    """Qwen2 with its language-model head; `config` is transformers' Qwen2Config."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        hidden, size, act = config.hidden_size, config.intermediate_size, config.hidden_act
        rotary = RotaryEmbedding(config, context)

        def layer(index: int, prefix: str) -> PreNormLayer:
            name = f"{prefix}.self_attn"
            # Some layers may see a sliding window only.
            window = config.sliding_window if config.layer_types[index] == "sliding_attention" else None
            attention = SelfAttention(config, rotary, context, name, bias=True, window=window)
            mlp = GatedMLP(f"{prefix}.mlp", hidden, size, act, context)
            return PreNormLayer(prefix, hidden, config.rms_norm_eps, attention, mlp)

        super().__init__(Decoder(config, context, layer), config, context)
