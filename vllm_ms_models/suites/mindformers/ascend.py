"""mindformers' networks as they are, fed from our batches, on Ascend. **Not run on hardware.**

A network takes, besides tokens and positions, how vLLM's sequences lie in the paged cache, in its own terms
(`mindformers.generation.text_generator` prepares the same for its own loop):

| argument            | dtype, shape                | is                                                        |
| ------------------- | --------------------------- | --------------------------------------------------------- |
| batch_valid_length  | int32 [n]                   | tokens of each sequence so far, this step's included       |
| q_seq_lens          | int32 [n]                   | this step's                                                |
| context_lens_tensor | int32 [n]                   | those before                                               |
| block_tables        | int32 [n, blocks]           | the cache's blocks of each sequence                        |
| slot_mapping        | int32 [tokens]              | block * block_size + offset of each token                  |
| attention_mask      | the model's, [rows, width]  | see `_mask`                                                |
| key_cache           | a list, a tensor each layer | [blocks, block_size, kv_heads, head_size]; latents: 1 head |
| value_cache         | the same; None for latents  |                                                            |

Of two flags, `is_prefill` says that no sequence has context: then attention is FlashAttentionScore over what was just
computed. Otherwise it is PagedAttention, whatever mix of chunks and single tokens there is.
"""

from typing import Any

import mindspore as ms
from mindspore import Tensor, mint, mutable, nn

from vllm_ms_models import kernels
from vllm_ms_models.kernels.ascend.caches import doubled_slots, half_blocks
from vllm_ms_models.kernels.ascend.prepared import Prepared, triangle
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch, CacheView
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.suites.mindformers.parts import CoreLatentAttention
from vllm_ms_models.suites.mindformers.served import ServedNetwork


class AscendCausalLM(ServedNetwork):
    """A network of mindformers, as `bridge/model.py` wants it."""

    def __init__(self, network: Any, hf_config: Any, context: ModelContext) -> None:
        super().__init__(network, hf_config)
        self.dtype = context.dtype
        self.latent = network.transformer_config.multi_latent_attention
        network.set_dynamic_inputs()
        # Never called: vLLM finds here how much cache each layer needs, and binds it.
        self.attention = nn.CellList([_cache_owner(i, layer) for i, layer in enumerate(network.model.decoder.layers)])

    def construct(self, input_ids: Tensor | None, batch: Batch, inputs_embeds: Tensor | None = None) -> Tensor:
        """Tokens to the last hidden states `[tokens, hidden]`."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("mindformers' networks take no embeddings on Ascend; leave out --enable-prompt-embeds.")
        caches = [layer.cache for layer in self.attention]
        view = batch.caches[self.attention[0].name]
        fresh, places = step_inputs(view, None if self.latent else caches[0].shape[2], self.dtype)
        self.network.phase = "prefill" if fresh else "increment"
        self.network.add_flags_custom_mcore(is_prefill=fresh)
        return self.network(
            input_ids.astype(ms.int32),
            positions=batch.positions.astype(ms.int32),
            **places,
            **self._caches(caches),
        )

    def _caches(self, caches: list[Tensor]) -> dict[str, Any]:
        if self.latent:
            return {"key_cache": mutable([cache.expand_dims(2) for cache in caches]), "value_cache": None}
        keys, values = zip(*map(half_blocks, caches), strict=True)
        return {"key_cache": mutable(list(keys)), "value_cache": mutable(list(values))}


def _cache_owner(number: int, layer: Any) -> Layer:
    name, block = f"model.layers.{number}.self_attn.attn", layer.self_attention
    if block.config.multi_latent_attention:
        return CoreLatentAttention(name, block, 1.0)
    heads = block.num_attention_heads_per_partition, block.num_query_groups_per_partition
    return Attention(name, *heads, block.hidden_size_per_attention_head)


class _Device:
    """What `Prepared` asks of a device: to have the tensors that it makes."""

    @staticmethod
    def to_device(x: Tensor) -> Tensor:
        return kernels.get().place(x)


def step_inputs(view: CacheView, block_size: int | None, dtype: ms.Type) -> tuple[bool, dict[str, Tensor]]:
    """Whether no sequence has context; and the network's arguments that say where all are (see the module).

    Keys and values are views of one cache in which block b, of `block_size` tokens, is number 2 b
    (kernels/ascend/caches.py). None: a cache of latents, which are by themselves.
    """
    sequences = Prepared.of(view.sequences, _Device())
    pages = sequences.pages(None, block_size or 1, block_size is not None)
    slots = view.slots.astype(ms.int32) if block_size is None else doubled_slots(view.slots, block_size)
    return sequences.fresh, {
        "batch_valid_length": sequences.seq_lens,
        "q_seq_lens": sequences.query_lens,
        "context_lens_tensor": sequences.seq_lens - sequences.query_lens,
        "block_tables": pages.tables,
        "slot_mapping": slots,
        "attention_mask": _mask(sequences.mask(pages, None, True, dtype), sequences.fresh, dtype),
    }


def _mask(paged: Tensor | None, fresh: bool, dtype: ms.Type) -> Tensor:
    """A triangle that FlashAttentionScore repeats; or, for PagedAttention, what it adds: a single 0 if that is all."""
    if fresh:
        return kernels.get().place(triangle(dtype))
    return mint.zeros((1, 1), dtype=dtype) if paged is None else paged
