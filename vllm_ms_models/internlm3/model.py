"""InternLM3 (2025): Llama, with biases where its config says so."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.registry import register_model


@register_model("InternLM3ForCausalLM")
class InternLM3ForCausalLM(CausalLM):
    """InternLM3 with its language-model head; `config` is an InternLM3Config."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        hidden, size, act, bias = config.hidden_size, config.intermediate_size, config.hidden_act, config.bias
        rotary = RotaryEmbedding(config, context)

        def layer(_: int, prefix: str) -> PreNormLayer:
            name = f"{prefix}.self_attn"
            attention = SelfAttention(config, rotary, context, name, bias=config.qkv_bias, out_bias=bias)
            mlp = GatedMLP(f"{prefix}.mlp", hidden, size, act, context, bias)
            return PreNormLayer(prefix, hidden, config.rms_norm_eps, attention, mlp)

        super().__init__(Decoder(config, context, layer), config, context)
