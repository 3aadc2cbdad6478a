"""What takes the place of mindformers' Cells on a CPU, each called as the one that it replaces.

The batch reaches them as the arguments that mindformers calls slot mapping and block tables, which all of its layers
hand on as they are.
"""

from typing import Any

from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.mla import LatentAttention
from vllm_ms_models.layers.moe import MoE, Routing, noaux_tc, softmax_top_k
from vllm_ms_models.layers.norm import RMSNorm
from vllm_ms_models.layers.rotary import RotaryEmbedding


class Norm(RMSNorm):
    """Instead of RMSNorm; what it normalises may be a view of a larger tensor."""

    def construct(self, x: Tensor) -> Tensor:
        return super().construct(x.contiguous())


class Rotary(Layer):
    """Instead of RotaryEmbedding: the model's, which looks up angles, and the layers', which rotate by them.

    As the model's it hands on the positions in the place of cosines and sines.
    """

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary

    def get_cos_sin_for_decode(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What the layers get as cosines and sines."""
        return positions, positions

    def construct(
        self, query: Tensor, key: Tensor, positions: Tensor, same: Tensor, lengths: None
    ) -> tuple[Tensor, Tensor]:
        """`[tokens, heads * head_size]` queries and `[tokens, kv_heads * head_size]` keys, rotated."""
        query, key = query.contiguous(), key.contiguous()
        self.rotary(query, key, positions)
        return query, key


class CoreAttention(Layer):
    """Instead of FlashAttention: over the paged cache of our own attention."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def construct(self, query: Tensor, key: Tensor, value: Tensor, block_tables: Batch, **_: Any) -> Tensor:
        """Of `[tokens, features]` each: as `Attention`. What else there is says the same as the batch, or is None."""
        return self.attention(query, key, value.contiguous(), block_tables)


class CoreLatentAttention(LatentAttention):
    """Instead of FlashAttention in latent attention whose queries are absorbed, over our own paged cache of latents.

    `block` is mindformers' MLASelfAttention. Its name, and what vLLM must know of the cache, as of `LatentAttention`.
    """

    def __init__(self, name: str, block: Any, softmax_factor: float) -> None:
        Layer.__init__(self)
        self.name = name
        self.num_heads = block.num_attention_heads_per_partition
        self.rank = block.config.kv_lora_rank
        self.width = self.rank + block.config.qk_pos_emb_head_dim
        self.scale = block.q_head_dim**-0.5 * softmax_factor
        self.kernels = kernels.get()
        self.cache: Tensor | None = None

    def reshape_and_cache(self, rows: Tensor, value: None, keys: None, values: None, slot_mapping: Batch) -> Tensor:
        """Store each token's latent and rotated key, `[tokens, width]`."""
        latent, key = rows[:, : self.rank].contiguous(), rows[:, self.rank :].contiguous()
        self.kernels.write_latent(latent, key, self.cache, slot_mapping.caches[self.name].slots)
        return rows

    def construct(  # type: ignore[override]
        self, query: Tensor, key: None, value: None, batch: Batch, *_: Any, **more: Any
    ) -> Tensor:
        """Of `[tokens, heads * width]` queries: means of latents, `[tokens, heads * rank]`."""
        sequences = batch.caches[self.name].sequences
        return self.kernels.mla_attention(query.contiguous(), self.cache, sequences, self.scale, self.rank)


class Experts(Layer):
    """Instead of GroupedMLP, of a MoELayer of mindformers; and chooses the experts too, by what its router would.

    The layer's router and dispatcher give way to a `Passage`. Its shared experts, and the sum, stay its own.
    """

    def __init__(self, config: Any, context: ModelContext, prefix: str) -> None:
        super().__init__()
        sizes = config.hidden_size, config.moe_ffn_hidden_size, config.num_moe_experts
        biased = config.moe_router_enable_expert_bias
        self.experts = MoE(prefix, *sizes, routing(config), config.hidden_act, context, correction_bias=biased)

    def construct(self, hidden: Tensor, group_list: None) -> Tensor:
        """`[tokens, hidden]` -> `[tokens, hidden]`."""
        return self.experts(hidden)


class Passage(Layer):
    """Instead of a MoELayer's router and token dispatcher: all tokens go to the experts as they are."""

    def construct(self, hidden: Tensor) -> tuple[None, None]:
        return None, None

    def dispatch_preprocess(self, shares: None, experts: None) -> tuple[None, None]:
        return None, None

    def token_dispatch(self, hidden: Tensor, experts: None) -> tuple[Tensor, None, tuple[()]]:
        return hidden, None, ()

    def token_combine(self, output: Tensor, shares: None) -> Tensor:
        return output


def routing(config: Any) -> Routing:
    """That of mindformers' TopKRouter, of a TransformerConfig."""
    if config.moe_router_score_function == "softmax":
        return softmax_top_k(config.moe_router_topk, config.norm_topk_prob)
    groups, top_groups = config.moe_router_num_groups or 1, config.moe_router_group_topk or 1
    scale = config.moe_router_topk_scaling_factor or 1.0
    return noaux_tc(config.moe_router_topk, groups, top_groups, scale, config.norm_topk_prob)
