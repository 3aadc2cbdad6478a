"""gpt-oss (OpenAI, 2025): experts with biases and a clamped gate, attention with a sink for each head."""

from typing import Any

from vllm_ms_models.layers.activation import CLAMPED_SWIGLU
from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.moe import ExpertNames, MoE, softmax_top_k
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.registry import register_model

# What the gate is computed with (`Kernels.linear_gated`).
CLAMPED = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
NAMES = ExpertNames(gate="router")


def experts(config: Any, context: ModelContext, prefix: str) -> MoE:
    """All in one tensor for each projection; shares are the softmax of the chosen logits."""
    routing = softmax_top_k(config.num_experts_per_tok, renormalize=True)
    hidden, size, count = config.hidden_size, config.intermediate_size, config.num_local_experts
    return MoE(prefix, hidden, size, count, routing, CLAMPED_SWIGLU, context, names=NAMES, stacked=True)


@register_model("GptOssForCausalLM")
class GptOssForCausalLM(CausalLM):
    """gpt-oss with its language-model head; `config` is transformers' GptOssConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        for key, value in CLAMPED.items():
            if (found := getattr(config, key, value)) != value:
                raise ValueError(f"{key} {found!r} in config.json is not supported; only {value} is.")
        rotary, bias = RotaryEmbedding(config, context), config.attention_bias

        def layer(number: int, prefix: str) -> PreNormLayer:
            window = config.sliding_window if config.layer_types[number] == "sliding_attention" else None
            attention = SelfAttention(
                config, rotary, context, f"{prefix}.self_attn", bias=bias, out_bias=bias, window=window, sinks="sinks"
            )
            moe = experts(config, context, f"{prefix}.mlp")
            return PreNormLayer(prefix, config.hidden_size, config.rms_norm_eps, attention, moe)

        super().__init__(Decoder(config, context, layer), config, context)
