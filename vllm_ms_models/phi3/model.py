"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al., 2024): a pre-norm decoder whose projections are fused in the checkpoint."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import FUSED, SelfAttention
from vllm_ms_models.registry import register_model


@register_model("Phi3ForCausalLM")
class Phi3ForCausalLM(CausalLM):
    """Phi-3 with its language-model head; `config` is transformers' Phi3Config."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        hidden, size, act = config.hidden_size, config.intermediate_size, config.hidden_act
        rotary = RotaryEmbedding(config, context)  # of a part of each head in Phi-4-mini

        def layer(_: int, prefix: str) -> PreNormLayer:
            window = config.sliding_window  # the same for all layers
            attention = SelfAttention(config, rotary, context, f"{prefix}.self_attn", qkv=FUSED, window=window)
            mlp = GatedMLP(f"{prefix}.mlp", hidden, size, act, context, names=("gate_up_proj", "down_proj"))
            return PreNormLayer(prefix, hidden, config.rms_norm_eps, attention, mlp)

        super().__init__(Decoder(config, context, layer), config, context)
