"""The encoder of BERT (Devlin et al., 2019), which RoBERTa shares: embeddings, then layers that add, then normalise."""

from typing import Any

import mindspore as ms
from mindspore import Tensor, mint, nn

from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.embedding import LearnedEmbedding, VocabParallelEmbedding
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm_ms_models.layers.mlp import MLP
from vllm_ms_models.layers.norm import LayerNorm
from vllm_ms_models.layers.ragged_attention import RaggedAttention


class EncoderEmbeddings(Layer):
    """Words, token types and learned positions, added and normalised: `[tokens, hidden]`.

    A sequence's first token has row `first_position` of the checkpoint's table of positions. Positions and types are on
    every rank; only the vocabulary is split.
    """

    def __init__(self, prefix: str, config: Any, context: ModelContext, first_position: int) -> None:
        super().__init__()
        hidden, dtype = config.hidden_size, context.dtype
        self.words = VocabParallelEmbedding(f"{prefix}.word_embeddings", config.vocab_size, hidden, context)
        self.types = LearnedEmbedding(f"{prefix}.token_type_embeddings", config.type_vocab_size, hidden, dtype)
        self.positions = LearnedEmbedding(
            f"{prefix}.position_embeddings", config.max_position_embeddings, hidden, dtype, first_position
        )
        self.norm = LayerNorm(f"{prefix}.LayerNorm", hidden, config.layer_norm_eps)

    def construct(self, input_ids: Tensor, batch: Batch) -> Tensor:
        types = batch.token_types
        if types is None:
            types = mint.zeros(input_ids.shape, dtype=ms.int32)
        return self.norm(self.words(input_ids) + self.types(types) + self.positions(batch.positions))


class EncoderAttention(Layer):
    """Each token attends to its whole sequence; the result is added to the input and normalised."""

    def __init__(self, prefix: str, config: Any, context: ModelContext) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        names = [f"{prefix}.self.{name}" for name in ("query", "key", "value")]
        self.qkv_proj = QKVParallelLinear(names, hidden, heads, heads, hidden // heads, context, bias=True)
        self.attention = RaggedAttention(self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, hidden // heads)
        self.dense = RowParallelLinear(f"{prefix}.output.dense", hidden, hidden, context, bias=True)
        self.norm = LayerNorm(f"{prefix}.output.LayerNorm", hidden, config.layer_norm_eps)

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        query, key, value = self.qkv_proj(hidden, batch)
        attended = self.attention(query, key, value, batch.ragged)
        return self.norm(self.dense(attended, batch) + hidden)


class EncoderLayer(Layer):
    """Attention and MLP, each added to its input and normalised."""

    def __init__(self, prefix: str, config: Any, context: ModelContext) -> None:
        super().__init__()
        hidden = config.hidden_size
        names = f"{prefix}.intermediate.dense", f"{prefix}.output.dense"
        self.attention = EncoderAttention(f"{prefix}.attention", config, context)
        self.mlp = MLP(names, hidden, config.intermediate_size, config.hidden_act, context)
        self.norm = LayerNorm(f"{prefix}.output.LayerNorm", hidden, config.layer_norm_eps)

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        hidden = self.attention(hidden, batch)
        return self.norm(self.mlp(hidden, batch) + hidden)


class Encoder(Layer):
    """Token ids to the last hidden states `[tokens, hidden]`; `config` is transformers' BertConfig or a kin's.

    `prefix` is what the names of its tensors begin with, such as `bert.`, or nothing.
    """

    # Of the checkpoint: the numbers 0, 1, 2, ..., and the heads of other tasks.
    ignored: tuple[str, ...] = ("*embeddings.position_ids", "*pooler.*", "cls.*", "lm_head.*")

    def __init__(self, prefix: str, config: Any, context: ModelContext, first_position: int = 0) -> None:
        super().__init__()
        check_config(config)
        self.prefix = prefix
        self.embeddings = EncoderEmbeddings(f"{prefix}embeddings", config, context, first_position)
        self.layers = nn.CellList(
            [EncoderLayer(f"{prefix}encoder.layer.{i}", config, context) for i in range(config.num_hidden_layers)]
        )

    def construct(self, input_ids: Tensor, batch: Batch) -> Tensor:
        hidden = self.embeddings(input_ids, batch)
        for layer in self.layers:
            hidden = layer(hidden, batch)
        return hidden

    def embed(self, input_ids: Tensor) -> Tensor:
        """The embeddings of words `[tokens, hidden]`."""
        return self.embeddings.words(input_ids)


def check_config(config: Any) -> None:
    """ValueError for what an encoder's config.json may ask for and this is not."""
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ValueError(
            f"position_embedding_type {kind!r} in config.json is not supported; only absolute, learned ones are."
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError("is_decoder and add_cross_attention in config.json are not supported: serve an encoder.")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} in config.json is no multiple of num_attention_heads "
            f"{config.num_attention_heads}; correct config.json."
        )
