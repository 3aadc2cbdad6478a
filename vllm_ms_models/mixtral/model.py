"""Mixtral (Jiang et al., 2024): a pre-norm decoder in which every feed-forward block is a mixture of experts."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.attention import Attention
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

EXPERT_NAMES = ExpertNames(gate_proj="w1", up_proj="w3", down_proj="w2")


class MixtralAttention(Layer):
    """Self-attention; `window` is the same for all layers."""

    def __init__(self, config: Any, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, heads, head_size = config.hidden_size, config.num_attention_heads, rotary.head_size
        names = [f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        kv_heads = config.num_key_value_heads
        self.qkv_proj = QKVParallelLinear(names, hidden, heads, kv_heads, head_size, context)
        self.o_proj = RowParallelLinear(f"{prefix}.o_proj", heads * head_size, hidden, context)
        self.rotary = rotary
        window = config.sliding_window
        self.attention = Attention(
            f"{prefix}.attn", self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, head_size, window=window
        )

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        query, key, value = self.qkv_proj(hidden, batch)
        self.rotary(query, key, batch.positions)
        return self.o_proj(self.attention(query, key, value, batch), batch)


class MixtralDecoderLayer(Layer):
    """Attention and experts, each behind a norm, each added to the residual stream by the next norm."""

    def __init__(self, config: Any, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = AddRMSNorm(f"{prefix}.input_layernorm", hidden, eps)
        self.self_attn = MixtralAttention(config, rotary, context, f"{prefix}.self_attn")
        self.post_attention_layernorm = AddRMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps)
        routing = softmax_top_k(config.num_experts_per_tok, renormalize=True)
        size, experts, act = config.intermediate_size, config.num_local_experts, config.hidden_act
        moe = f"{prefix}.block_sparse_moe"
        self.block_sparse_moe = MoE(moe, hidden, size, experts, routing, act, context, names=EXPERT_NAMES)

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.self_attn(hidden, batch), residual)
        return self.block_sparse_moe(hidden, batch), residual


@register_model("MixtralForCausalLM")
class MixtralForCausalLM(CausalLM):
    """Mixtral with its language-model head; `config` is transformers' MixtralConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        rotary = RotaryEmbedding(config, context)
        model = Decoder(config, context, lambda _, prefix: MixtralDecoderLayer(config, rotary, context, prefix))
        super().__init__(model, config, context)
