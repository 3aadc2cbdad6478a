"""GLM-4 (GLM team, 2024), `GlmForCausalLM`; and GLM-4-0414, `Glm4ForCausalLM`, with norms behind the blocks too."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.norm import AddRMSNorm, RMSNorm
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.registry import register_model

Blocks = tuple[SelfAttention, GatedMLP]


def blocks(config: Any, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> Blocks:
    """Attention and MLP of a layer; gate and up are one matrix in the checkpoint."""
    attention = SelfAttention(config, rotary, context, f"{prefix}.self_attn", bias=config.attention_bias)
    hidden, size, act = config.hidden_size, config.intermediate_size, config.hidden_act
    mlp = GatedMLP(f"{prefix}.mlp", hidden, size, act, context, names=("gate_up_proj", "down_proj"))
    return attention, mlp


class Glm4DecoderLayer(Layer):
    """Attention and MLP, each between two norms, each added to the residual stream by the norm after."""

    def __init__(self, config: Any, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = AddRMSNorm(f"{prefix}.input_layernorm", hidden, eps)
        self.self_attn, self.mlp = blocks(config, rotary, context, prefix)
        self.post_self_attn_layernorm = RMSNorm(f"{prefix}.post_self_attn_layernorm", hidden, eps)
        self.post_attention_layernorm = AddRMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps)
        self.post_mlp_layernorm = RMSNorm(f"{prefix}.post_mlp_layernorm", hidden, eps)

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.post_self_attn_layernorm(self.self_attn(hidden, batch))
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.post_mlp_layernorm(self.mlp(hidden, batch)), residual


@register_model("Glm4ForCausalLM")
class Glm4ForCausalLM(CausalLM):
    """GLM-4-0414 with its language-model head; `config` is transformers' Glm4Config."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        rotary = RotaryEmbedding(config, context, interleaved=True)
        model = Decoder(config, context, lambda _, prefix: Glm4DecoderLayer(config, rotary, context, prefix))
        super().__init__(model, config, context)


@register_model("GlmForCausalLM")
class GlmForCausalLM(CausalLM):
    """GLM-4 with its language-model head; `config` is transformers' GlmConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        rotary = RotaryEmbedding(config, context, interleaved=True)

        def layer(_: int, prefix: str) -> PreNormLayer:
            attention, mlp = blocks(config, rotary, context, prefix)
            return PreNormLayer(prefix, config.hidden_size, config.rms_norm_eps, attention, mlp)

        super().__init__(Decoder(config, context, layer), config, context)
