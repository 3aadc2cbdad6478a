"""GLM-4 (GLM team, 2024), `GlmForCausalLM`; and GLM-4-0414, `Glm4ForCausalLM`, with norms behind the blocks too."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.pre_norm import PreNormLayer, SandwichNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.registry import register_model

# In the order in which they come: the third is named after what is before it.
NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")

Blocks = tuple[SelfAttention, GatedMLP]


def blocks(config: Any, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> Blocks:
    """Attention and MLP of a layer; gate and up are one matrix in the checkpoint."""
    attention = SelfAttention(config, rotary, context, f"{prefix}.self_attn", bias=config.attention_bias)
    hidden, size, act = config.hidden_size, config.intermediate_size, config.hidden_act
    mlp = GatedMLP(f"{prefix}.mlp", hidden, size, act, context, names=("gate_up_proj", "down_proj"))
    return attention, mlp


@register_model("Glm4ForCausalLM")
class Glm4ForCausalLM(CausalLM):
    """GLM-4-0414 with its language-model head; `config` is transformers' Glm4Config."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        rotary = RotaryEmbedding(config, context, interleaved=True)

        def layer(_: int, prefix: str) -> SandwichNormLayer:
            attention, mlp = blocks(config, rotary, context, prefix)
            return SandwichNormLayer(prefix, config.hidden_size, config.rms_norm_eps, attention, mlp, NORMS)

        super().__init__(Decoder(config, context, layer), config, context)


@register_model("GlmForCausalLM")
class GlmForCausalLM(CausalLM):
    """GLM-4 with its language-model head; `config` is transformers' GlmConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        rotary = RotaryEmbedding(config, context, interleaved=True)

        def layer(_: int, prefix: str) -> PreNormLayer:
            attention, mlp = blocks(config, rotary, context, prefix)
            return PreNormLayer(prefix, config.hidden_size, config.rms_norm_eps, attention, mlp)

        super().__init__(Decoder(config, context, layer), config, context)
