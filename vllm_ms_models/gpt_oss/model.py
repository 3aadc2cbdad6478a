"""gpt-oss (OpenAI, 2025): experts with biases and a clamped gate, attention with a sink for each head."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.activation import CLAMPED_SWIGLU
from vllm_ms_models.layers.attention import SinkAttention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm_ms_models.layers.moe import ExpertNames, MoE, softmax_top_k
from vllm_ms_models.layers.norm import AddRMSNorm
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.registry import register_model

# What the gate is computed with (`Kernels.linear_gated`).
CLAMPED = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
NAMES = ExpertNames(gate="router")


class GptOssAttention(Layer):
    """Self-attention over a window or everything; what a head does not attend to at all goes to its sink."""

    def __init__(self, config: Any, layer: int, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, heads, head_size = config.hidden_size, config.num_attention_heads, rotary.head_size
        names = [f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        kv_heads, bias = config.num_key_value_heads, config.attention_bias
        self.qkv_proj = QKVParallelLinear(names, hidden, heads, kv_heads, head_size, context, bias)
        self.o_proj = RowParallelLinear(f"{prefix}.o_proj", heads * head_size, hidden, context, bias)
        self.rotary = rotary
        window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
        own, own_kv = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        sinks = f"{prefix}.sinks"
        self.attention = SinkAttention(f"{prefix}.attn", own, own_kv, head_size, sinks, context, window=window)

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        query, key, value = self.qkv_proj(hidden, batch)
        self.rotary(query, key, batch.positions)
        return self.o_proj(self.attention(query, key, value, batch), batch)


class GptOssDecoderLayer(Layer):
    """Attention and experts, each behind a norm, each added to the residual stream by the next norm."""

    def __init__(self, config: Any, layer: int, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = AddRMSNorm(f"{prefix}.input_layernorm", hidden, eps)
        self.self_attn = GptOssAttention(config, layer, rotary, context, f"{prefix}.self_attn")
        self.post_attention_layernorm = AddRMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps)
        routing = softmax_top_k(config.num_experts_per_tok, renormalize=True)  # the softmax of the chosen logits
        size, experts = config.intermediate_size, config.num_local_experts
        self.mlp = MoE(
            f"{prefix}.mlp", hidden, size, experts, routing, CLAMPED_SWIGLU, context, names=NAMES, stacked=True
        )

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.self_attn(hidden, batch), residual)
        return self.mlp(hidden, batch), residual


@register_model("GptOssForCausalLM")
class GptOssForCausalLM(CausalLM):
    """gpt-oss with its language-model head; `config` is transformers' GptOssConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        for key, value in CLAMPED.items():
            if (found := getattr(config, key, value)) != value:
                raise ValueError(f"{key} {found!r} in config.json is not supported; only {value} is.")
        rotary = RotaryEmbedding(config, context)
        model = Decoder(
            config, context, lambda layer, prefix: GptOssDecoderLayer(config, layer, rotary, context, prefix)
        )
        super().__init__(model, config, context)
