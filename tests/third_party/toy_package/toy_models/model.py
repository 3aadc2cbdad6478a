"""Toy: Qwen2 whose embeddings are multiplied by `embedding_scale` of config.json. It stands for your own model."""

from typing import Any

from mindspore import Tensor, nn

from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm_ms_models.layers.logits import LogitsProcessor
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.norm import RMSNorm
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.registry import register_model


class ToyLayer(nn.Cell):
    """Attention and MLP, each behind a norm and added to what came in."""

    def __init__(self, config: Any, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, heads, head_size = config.hidden_size, config.num_attention_heads, rotary.head_size
        names = [f"{prefix}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        self.input_norm = RMSNorm(f"{prefix}.input_layernorm", hidden, config.rms_norm_eps)
        self.qkv_proj = QKVParallelLinear(
            names, hidden, heads, config.num_key_value_heads, head_size, context, bias=True
        )
        self.rotary = rotary
        self.attention = Attention(f"{prefix}.attn", self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, head_size)
        self.o_proj = RowParallelLinear(f"{prefix}.self_attn.o_proj", heads * head_size, hidden, context)
        self.mlp_norm = RMSNorm(f"{prefix}.post_attention_layernorm", hidden, config.rms_norm_eps)
        self.mlp = GatedMLP(f"{prefix}.mlp", hidden, config.intermediate_size, config.hidden_act, context)

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        query, key, value = self.qkv_proj(self.input_norm(hidden), batch)
        query, key = self.rotary(query, key, batch.positions)
        hidden = hidden + self.o_proj(self.attention(query, key, value, batch), batch)
        return hidden + self.mlp(self.mlp_norm(hidden), batch)


@register_model("ToyForCausalLM")
class ToyForCausalLM(Layer):
    """The whole model; `config` is transformers' object for the checkpoint's config.json."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        super().__init__()
        vocabulary, hidden, rotary = config.vocab_size, config.hidden_size, RotaryEmbedding(config, context)
        self.scale = config.embedding_scale
        self.embed_tokens = VocabParallelEmbedding("model.embed_tokens", vocabulary, hidden, context)
        self.layers = nn.CellList(
            [ToyLayer(config, rotary, context, f"model.layers.{layer}") for layer in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm("model.norm", hidden, config.rms_norm_eps)
        self.lm_head = ParallelLMHead("lm_head", vocabulary, hidden, context)
        self.logits_processor = LogitsProcessor()

    def construct(self, input_ids: Tensor | None, batch: Batch, inputs_embeds: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, batch)
        return self.norm(hidden)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids) * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        return self.logits_processor(self.lm_head, hidden)
