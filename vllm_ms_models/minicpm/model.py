"""MiniCPM (Hu et al., 2024) and MiniCPM4: Llama with factors on the embedding, residual sums and logits (muP)."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.scaled import ScaledDecoder, ScaledLogits
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.minicpm.config import check
from vllm_ms_models.registry import register_model


@register_model("MiniCPMForCausalLM")
class MiniCPMForCausalLM(CausalLM):
    """MiniCPM with its language-model head; `config` is a MiniCPMConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        check(config)
        hidden, size, act, bias = config.hidden_size, config.intermediate_size, config.hidden_act, config.attention_bias
        rotary = RotaryEmbedding(config, context)

        def layer(_: int, prefix: str, eps: float) -> PreNormLayer:
            attention = SelfAttention(config, rotary, context, f"{prefix}.self_attn", bias=bias, out_bias=bias)
            mlp = GatedMLP(f"{prefix}.mlp", hidden, size, act, context)
            return PreNormLayer(prefix, hidden, eps, attention, mlp)

        depth = config.scale_depth / config.num_hidden_layers**0.5
        model = ScaledDecoder(config, context, layer, config.scale_emb, depth)
        super().__init__(model, config, context, ScaledLogits(config.dim_model_base / hidden, hidden))
