"""mindformers' networks on a CPU: norms, rotary embeddings, core attention and experts on our kernels.

Those of mindformers call RmsNorm, ApplyRotaryPosEmb, ReshapeAndCache, FlashAttentionScore, PagedAttention and grouped
products, which MindSpore has for Ascend only. Everything else is its own: embedding, linear layers, activation, the
order of it all. Ours use the paged cache that vLLM allocates, hence prompts and single tokens in one batch, chunks of
prompts and cached prefixes work as in our own models.
"""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.suites.mindformers import weights
from vllm_ms_models.suites.mindformers.parts import CoreAttention, CoreLatentAttention, Experts, Norm, Passage, Rotary
from vllm_ms_models.suites.mindformers.served import ServedNetwork


class CpuCausalLM(ServedNetwork):
    """A network of mindformers with our parts, as `bridge/model.py` wants it."""

    def __init__(self, network: Any, hf_config: Any, context: ModelContext) -> None:
        super().__init__(network, hf_config)
        model = network.model
        model.move_lens_to_cpu = False  # there are none
        model.is_prefill = False  # angles by position
        model.pre_process = False  # it is given embeddings
        replace_norms(network)
        interleaved = network.transformer_config.rotary_cos_format == "interleaved"
        rotary = RotaryEmbedding(hf_config, context, interleaved)
        model.rotary_pos_emb = Rotary(rotary)
        for number, layer in enumerate(model.decoder.layers):
            prefix, block = f"model.layers.{number}", layer.self_attention
            block.is_prefill = False  # latent attention absorbs queries
            block.rotary_emb = model.rotary_pos_emb
            block.core_attention = _core_attention(f"{prefix}.self_attn.attn", block, rotary)
            if layer.moe_layer:
                layer.mlp.router = layer.mlp.token_dispatcher = Passage()
                layer.mlp.experts = Experts(network.transformer_config, context, f"{prefix}.mlp")

    def construct(self, input_ids: Tensor | None, batch: Batch, inputs_embeds: Tensor | None = None) -> Tensor:
        """Tokens (or embeddings) to the last hidden states `[tokens, hidden]`."""
        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return self.network.model(
            None, hidden_states=embeds, positions=batch.positions, slot_mapping=batch, block_tables=batch
        )


def _core_attention(name: str, block: Any, rotary: RotaryEmbedding) -> Layer:
    """In the place of that of `block`, mindformers' attention."""
    if block.config.multi_latent_attention:
        return CoreLatentAttention(name, block, rotary.softmax_factor)
    heads = block.num_attention_heads_per_partition, block.num_query_groups_per_partition
    return CoreAttention(Attention(name, *heads, block.hidden_size_per_attention_head))


def replace_norms(network: Any) -> None:
    """Put a `Norm` in the place of each RMSNorm, for the same tensor of the checkpoint."""
    from mindformers.parallel_core.inference.transformer.norm import RMSNorm

    for path, parent in list(network.model.cells_and_names()):
        for name, cell in parent.name_cells().items():
            if isinstance(cell, RMSNorm):
                own = f"{path}.{name}.weight".removeprefix(".")
                stored = weights.checkpoint_name(network, own).removesuffix(".weight")
                setattr(parent, name, Norm(stored, cell.hidden_size, cell.eps))
