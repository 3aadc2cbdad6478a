"""mindformers' networks on a CPU: norms, rotary embeddings and core attention on our kernels, all else its own.

Its own three call RmsNorm, ApplyRotaryPosEmb, ReshapeAndCache, FlashAttentionScore and PagedAttention, which MindSpore
has for Ascend only. Ours read the paged cache that vLLM allocates, so that batches of any mix of prompts and single
tokens, chunks of prompts and cached prefixes go the way that they do in our own models.
"""

from collections.abc import Iterator
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.norm import RMSNorm
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.suites.mindformers import weights


class Norm(RMSNorm):
    """Instead of mindformers' RMSNorm; what it normalises may be a view of a larger tensor."""

    def construct(self, x: Tensor) -> Tensor:
        return super().construct(x.contiguous())


class Rotary(Layer):
    """Instead of mindformers' RotaryEmbedding: both the model's, which chooses angles, and a layer's, which rotates.

    The model's hands the positions on to the layers' in the place of angles.
    """

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary

    def get_cos_sin_for_decode(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What each layer is called with as cos and sin."""
        return positions, positions

    def construct(
        self, query: Tensor, key: Tensor, positions: Tensor, same: Tensor, lengths: Any
    ) -> tuple[Tensor, Tensor]:
        """`[tokens, heads * head_size]` queries and `[tokens, kv_heads * head_size]` keys, rotated."""
        query, key = query.contiguous(), key.contiguous()
        self.rotary(query, key, positions)
        return query, key


class CoreAttention(Layer):
    """Instead of mindformers' FlashAttention; the batch comes as its `block_tables`."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def construct(self, query: Tensor, key: Tensor, value: Tensor, block_tables: Batch, **ignored: Any) -> Tensor:
        """Of `[tokens, features]` each: as `Attention`. What else mindformers passes on is None, or in the batch."""
        return self.attention(query, key, value.contiguous(), block_tables)


class CpuCausalLM(nn.Cell):
    """A network of mindformers as `bridge/model.py` wants it, on a CPU."""

    def __init__(self, network: Any, hf_config: Any, context: ModelContext) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        model = network.model
        model.move_lens_to_cpu = False  # there is none of them
        model.return_hidden_states = True  # not the logits of all tokens
        model.is_prefill = False  # angles by position
        model.pre_process = False  # takes embeddings
        replace_norms(network)
        rotary = Rotary(RotaryEmbedding(hf_config, context, interleaved=_is_interleaved(network)))
        model.rotary_pos_emb = rotary
        for number, layer in enumerate(model.decoder.layers):
            block = layer.self_attention
            block.rotary_emb = rotary
            heads = block.num_attention_heads_per_partition, block.num_query_groups_per_partition
            attention = Attention(f"model.layers.{number}.self_attn.attn", *heads, block.hidden_size_per_attention_head)
            block.core_attention = CoreAttention(attention)

    def construct(self, input_ids: Tensor | None, batch: Batch, inputs_embeds: Tensor | None = None) -> Tensor:
        """Tokens (or embeddings) to the last hidden states `[tokens, hidden]`."""
        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        # All of a network's layers pass `block_tables` on to core attention as it is.
        return self.network.model(None, hidden_states=embeds, positions=batch.positions, block_tables=batch)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings `[tokens, hidden]`."""
        return self.network.model.embedding(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[rows, vocab]` of hidden states `[rows, hidden]`."""
        return self.network.model.output_layer(hidden).astype(ms.float32)

    def slots(self) -> Iterator[Slot]:
        """Of all that is mindformers' own; norms have theirs."""
        return weights.slots(self.network)


def _is_interleaved(network: Any) -> bool:
    return network.transformer_config.rotary_cos_format == "interleaved"


def replace_norms(network: Any) -> None:
    """Put a `Norm` in the place of each RMSNorm, of the same size and the same tensor of the checkpoint."""
    from mindformers.parallel_core.inference.transformer.norm import RMSNorm as TheirNorm

    for path, parent in list(network.model.cells_and_names()):
        for name, cell in parent.name_cells().items():
            if isinstance(cell, TheirNorm):
                own = f"{path}.{name}.weight".removeprefix(".")
                stored = weights.checkpoint_name(network, own).removesuffix(".weight")
                setattr(parent, name, Norm(stored, cell.hidden_size, cell.eps))
