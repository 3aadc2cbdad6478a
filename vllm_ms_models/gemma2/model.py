"""Gemma (2024) and Gemma 2 (2024): scaled embeddings, norms with weights beside 1, GeGLU; Gemma 2 caps its scores."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.logits import LogitsProcessor
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.norm import AddRMSNorm
from vllm_ms_models.layers.pre_norm import PreNormLayer, SandwichNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.registry import register_model

OFFSET = 1.0  # of the weights of all norms
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def attention(
    config: Any, rotary: RotaryEmbedding, context: ModelContext, prefix: str, **options: Any
) -> SelfAttention:
    """Of heads of any size; `options` are Gemma 2's."""
    if config.use_bidirectional_attention:
        raise ValueError("use_bidirectional_attention in config.json is not supported; choose a causal model.")
    bias = config.attention_bias
    return SelfAttention(config, rotary, context, f"{prefix}.self_attn", bias=bias, out_bias=bias, **options)


def decoder(config: Any, context: ModelContext, layer: Any) -> Decoder:
    """`layer(number, prefix)` makes a layer."""
    return Decoder(
        config,
        context,
        layer,
        embedding_scale=config.hidden_size**0.5,
        make_norm=lambda name: AddRMSNorm(name, config.hidden_size, config.rms_norm_eps, OFFSET),
    )


@register_model("GemmaForCausalLM")
class GemmaForCausalLM(CausalLM):
    """Gemma with its language-model head; `config` is transformers' GemmaConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        rotary = RotaryEmbedding(config, context)

        def layer(_: int, prefix: str) -> PreNormLayer:
            mlp = GatedMLP(f"{prefix}.mlp", hidden, config.intermediate_size, config.hidden_act, context)
            attend = attention(config, rotary, context, prefix)
            return PreNormLayer(prefix, hidden, eps, attend, mlp, offset=OFFSET)

        super().__init__(decoder(config, context, layer), config, context)


@register_model("Gemma2ForCausalLM")
class Gemma2ForCausalLM(CausalLM):
    """Gemma 2 with its language-model head; `config` is transformers' Gemma2Config."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        rotary = RotaryEmbedding(config, context)
        options = {"scale": config.query_pre_attn_scalar**-0.5, "soft_cap": config.attn_logit_softcapping}

        def layer(number: int, prefix: str) -> SandwichNormLayer:
            window = config.sliding_window if config.layer_types[number] == "sliding_attention" else None
            attend = attention(config, rotary, context, prefix, window=window, **options)
            mlp = GatedMLP(f"{prefix}.mlp", hidden, config.intermediate_size, config.hidden_activation, context)
            return SandwichNormLayer(prefix, hidden, eps, attend, mlp, NORMS, OFFSET)

        logits = LogitsProcessor(soft_cap=config.final_logit_softcapping)
        super().__init__(decoder(config, context, layer), config, context, logits)
