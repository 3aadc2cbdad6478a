"""Gemma 3 (2025), its text part: as Gemma 2, with norms of queries and keys and an angle for each kind of layer."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.logits import LogitsProcessor
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.norm import AddRMSNorm
from vllm_ms_models.layers.pre_norm import SandwichNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention, head_norms
from vllm_ms_models.registry import register_model

OFFSET = 1.0  # of the weights of all norms
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


@register_model("Gemma3ForCausalLM")
class Gemma3ForCausalLM(CausalLM):
    """Gemma 3 with its language-model head; `config` is transformers' Gemma3TextConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        for key in ("use_bidirectional_attention", "attn_logit_softcapping"):
            if getattr(config, key):
                raise ValueError(f"{key} in config.json is not supported for Gemma 3; choose a model without it.")
        hidden, eps, bias, kinds = config.hidden_size, config.rms_norm_eps, config.attention_bias, config.layer_types
        rotary = {kind: RotaryEmbedding(config, context, layer_type=kind) for kind in sorted(set(kinds))}

        def layer(number: int, prefix: str) -> SandwichNormLayer:
            kind, name = kinds[number], f"{prefix}.self_attn"
            attention = SelfAttention(
                config,
                rotary[kind],
                context,
                name,
                bias=bias,
                out_bias=bias,
                scale=config.query_pre_attn_scalar**-0.5,
                window=config.sliding_window if kind == "sliding_attention" else None,
                norms=head_norms(config, rotary[kind], name, OFFSET),
            )
            mlp = GatedMLP(f"{prefix}.mlp", hidden, config.intermediate_size, config.hidden_activation, context)
            return SandwichNormLayer(prefix, hidden, eps, attention, mlp, NORMS, OFFSET)

        model = Decoder(
            config,
            context,
            layer,
            embedding_scale=hidden**0.5,
            make_norm=lambda name: AddRMSNorm(name, hidden, eps, OFFSET),
        )
        super().__init__(model, config, context, LogitsProcessor(soft_cap=config.final_logit_softcapping))
