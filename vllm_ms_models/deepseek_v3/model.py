"""DeepSeek-V3, R1 (arXiv:2412.19437) and V2 (arXiv:2405.04434), which routes otherwise: latent attention, experts."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.deepseek_v3 import config as entries
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.mla import MultiHeadLatentAttention
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.moe import MoE
from vllm_ms_models.layers.norm import AddRMSNorm
from vllm_ms_models.layers.prediction import prediction_tensors
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.registry import register_model


def feed_forward(config: Any, layer: int, context: ModelContext, prefix: str) -> GatedMLP | MoE:
    """A dense block in the first layers, experts in all others."""
    hidden, act = config.hidden_size, config.hidden_act
    if not entries.has_experts(config, layer):
        return GatedMLP(prefix, hidden, config.intermediate_size, act, context)
    return MoE(
        prefix,
        hidden,
        config.moe_intermediate_size,
        config.n_routed_experts,
        entries.routing(config),
        act,
        context,
        entries.shared_size(config),
        entries.has_correction_bias(config),
    )


def rotary(config: Any, context: ModelContext) -> RotaryEmbedding:
    """Of the last features of each head."""
    return RotaryEmbedding(config, context, entries.interleaved(config), before=config.qk_nope_head_dim)


class DeepseekV3DecoderLayer(Layer):
    """Attention and feed-forward, each behind a norm, each added to the residual stream by the next norm."""

    def __init__(self, config: Any, layer: int, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = AddRMSNorm(f"{prefix}.input_layernorm", hidden, eps)
        self.self_attn = MultiHeadLatentAttention(config, rotary, context, f"{prefix}.self_attn")
        self.post_attention_layernorm = AddRMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps)
        self.mlp = feed_forward(config, layer, context, f"{prefix}.mlp")

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.self_attn(hidden, batch), residual)
        return self.mlp(hidden, batch), residual


@register_model("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
class DeepseekV3ForCausalLM(CausalLM):
    """DeepSeek with its language-model head; `config` is transformers' DeepseekV2Config or DeepseekV3Config."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        entries.check(config)
        rotation = rotary(config, context)
        model = Decoder(
            config, context, lambda layer, prefix: DeepseekV3DecoderLayer(config, layer, rotation, context, prefix)
        )
        super().__init__(model, config, context)
        self.ignored = prediction_tensors(config)
