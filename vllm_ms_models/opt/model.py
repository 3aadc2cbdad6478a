"""OPT (Zhang et al., 2022): learned positions, LayerNorm and ReLU, and everything with a bias."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.embedding import LearnedEmbedding
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm_ms_models.layers.mlp import MLP
from vllm_ms_models.layers.norm import AddLayerNorm
from vllm_ms_models.registry import register_model

PADDING = 2  # rows of the table of positions that come before that of the first


def make_norm(config: Any, name: str) -> AddLayerNorm:
    return AddLayerNorm(name, config.hidden_size, affine=config.layer_norm_elementwise_affine)


class OPTAttention(Layer):
    """Self-attention; positions are in the hidden states already."""

    def __init__(self, config: Any, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.enable_bias
        if hidden % heads:
            raise ValueError(
                f"hidden_size {hidden} in config.json is not a multiple of num_attention_heads {heads}; correct one."
            )
        names = [f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        self.qkv_proj = QKVParallelLinear(names, hidden, heads, heads, hidden // heads, context, bias)
        self.out_proj = RowParallelLinear(f"{prefix}.out_proj", hidden, hidden, context, bias)
        own = self.qkv_proj.num_heads
        self.attention = Attention(f"{prefix}.attn", own, own, hidden // heads)

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        query, key, value = self.qkv_proj(hidden, batch)
        return self.out_proj(self.attention(query, key, value, batch), batch)


class OPTDecoderLayer(Layer):
    """Attention and MLP, each behind a norm; or, without `do_layer_norm_before` (OPT 350M), each before one, where the
    sum with what went in is normalised and goes on: the stream is then the hidden states themselves."""

    def __init__(self, config: Any, context: ModelContext, prefix: str) -> None:
        super().__init__()
        self.norm_before = config.do_layer_norm_before
        self.self_attn = OPTAttention(config, context, f"{prefix}.self_attn")
        self.self_attn_layer_norm = make_norm(config, f"{prefix}.self_attn_layer_norm")
        names = f"{prefix}.fc1", f"{prefix}.fc2"
        act, bias = config.activation_function, config.enable_bias
        self.mlp = MLP(names, config.hidden_size, config.ffn_dim, act, context, bias)
        self.final_layer_norm = make_norm(config, f"{prefix}.final_layer_norm")

    def construct(self, hidden: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.norm_before:
            hidden, residual = self.self_attn_layer_norm(hidden, residual)
            hidden, residual = self.final_layer_norm(self.self_attn(hidden, batch), residual)
            return self.mlp(hidden, batch), residual
        hidden, _ = self.self_attn_layer_norm(self.self_attn(hidden, batch), hidden)
        hidden, _ = self.final_layer_norm(self.mlp(hidden, batch), hidden)
        return hidden, hidden


class OPTDecoder(Decoder):
    """With learned positions; embeddings that are narrower than the hidden states go through a matrix on both ends."""

    def __init__(self, config: Any, context: ModelContext, prefix: str = "model.decoder") -> None:
        hidden, width, positions = config.hidden_size, config.word_embed_proj_dim, config.max_position_embeddings
        if context.max_model_len > positions:
            raise ValueError(
                f"--max-model-len {context.max_model_len} is beyond the {positions} positions that the model has "
                f"learned; use {positions} or less."
            )
        has_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
        super().__init__(
            config,
            context,
            lambda _, name: OPTDecoderLayer(config, context, name),
            prefix,
            embedding_size=width,
            norm_name="final_layer_norm",
            make_norm=lambda name: make_norm(config, name) if has_norm else None,
        )
        stage = context.pipeline
        self.project_in = self.project_out = None
        if stage.is_first:
            table = f"{prefix}.embed_positions"
            self.embed_positions = LearnedEmbedding(table, positions + PADDING, hidden, context.dtype, PADDING)
            if width != hidden:
                self.project_in = ReplicatedLinear(f"{prefix}.project_in", width, hidden, context)
        else:
            self.elsewhere += [f"{prefix}.embed_positions.*", f"{prefix}.project_in.*"]
        if not stage.is_last:
            self.elsewhere.append(f"{prefix}.project_out.*")
        elif width != hidden:
            self.project_out = ReplicatedLinear(f"{prefix}.project_out", hidden, width, context)

    def start(self, embeds: Tensor, batch: Batch) -> Tensor:
        if self.project_in is not None:
            embeds = self.project_in(embeds, batch)
        return embeds + self.embed_positions(batch["positions"])

    def finish(self, hidden: Tensor, residual: Tensor, batch: Batch) -> Tensor:
        if self.norm is not None:
            hidden, _ = self.norm(hidden, residual)
        elif self.layers and self.layers[-1].norm_before:
            hidden = hidden + residual
        return hidden if self.project_out is None else self.project_out(hidden, batch)


@register_model("OPTForCausalLM")
class OPTForCausalLM(CausalLM):
    """OPT with its language-model head; `config` is transformers' OPTConfig."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        super().__init__(OPTDecoder(config, context), config, context, head_size=config.word_embed_proj_dim)
