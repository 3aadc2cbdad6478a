"""vLLM's attention metadata -> our `CacheView`, once a step; and the layers that vLLM allocates KV cache for."""

from typing import Any

import mindspore as ms
import numpy as np
import torch
from mindspore.nn import Cell
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImplBase,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import (
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheLayout,
    KVCacheSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_ms_models import kernels
from vllm_ms_models.bridge.refusals import BLOCK_MULTIPLE, INT8_CACHE
from vllm_ms_models.bridge.tensors import DTYPES, to_mindspore, upload
from vllm_ms_models.kernels import SCALE_BYTES, PagedSequences
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import CacheView
from vllm_ms_models.layers.mla import EXPAND_FROM, LatentAttention
from vllm_ms_models.layers.ragged_attention import RaggedSequences


class MetadataBuilder(AttentionMetadataBuilder[Any]):
    """Shares vLLM's per-step tensors with MindSpore; all layers of a cache group get the same `CacheView`.

    Layers of an encoder get the sequences without any cache.
    """

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if isinstance(kv_cache_spec, MLAAttentionSpec):  # vLLM then puts the others behind those with fewer tokens
            self._init_reorder_batch_threshold(EXPAND_FROM - 1)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CacheView | RaggedSequences:
        common = common_attn_metadata
        if isinstance(self.kv_cache_spec, EncoderOnlyAttentionSpec):
            return RaggedSequences.of(np.diff(common.query_start_loc_cpu.numpy()).tolist())
        tokens = common.num_actual_tokens
        sequences = PagedSequences(
            query_start=to_mindspore(common.query_start_loc),
            seq_lens=to_mindspore(common.seq_lens),
            block_tables=to_mindspore(common.block_table_tensor),
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
        )
        return CacheView(sequences, upload(common.slot_mapping[:tokens]))


class MindSporeAttentionBackend(AttentionBackend):
    """Tells vLLM what our attention takes: any head size, our own cache layout, sliding windows."""

    supported_dtypes = [torch.bfloat16, torch.float16, torch.float32]  # noqa: RUF012 (vLLM's own declaration)
    supported_kv_cache_dtypes = ["auto", "bfloat16", "float16", INT8_CACHE]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        return "MINDSPORE"

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase]:
        raise NotImplementedError("Attention is computed by the model's own Attention cells.")

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # one layer's blocks lie together; what is inside a block is ours


class CachedLayer(AttentionLayerBase):
    """What vLLM sees of one `Attention` cell: the cache it needs; and the way the cache reaches the cell."""

    def __init__(self, cell: Attention, dtype: torch.dtype) -> None:
        self.cell = cell
        self.dtype = dtype
        self.num_heads = cell.num_heads
        self.kv_cache = torch.empty(0)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return MindSporeAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        cell = self.cell
        common: dict[str, Any] = {
            "block_size": vllm_config.cache_config.block_size,
            "num_kv_heads": cell.num_kv_heads,
            "head_size": cell.head_size,
            "dtype": self.dtype,
        }
        if vllm_config.cache_config.cache_dtype == INT8_CACHE:
            # vLLM leaves the place of the scales to the backend: they are within the bytes of a position.
            common["dtype"], common["kv_quant_mode"] = torch.int8, KVQuantMode.INT8_PER_TOKEN_HEAD
            common["state_content_bytes"] = 2 * (cell.head_size + SCALE_BYTES)
        if cell.window is not None:
            return SlidingWindowSpec(**common, sliding_window=cell.window)
        return FullAttentionSpec(**common)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """`kv_cache` is vLLM's `[blocks, heads, block_size, 2 * head_size]`; the cell sees our shape of it.

        Of int8, its last axis has room for two scales besides.
        """
        self.kv_cache = kv_cache
        blocks, _, block_size, _ = kv_cache.shape
        cell = self.cell
        storage = ms.int8 if kv_cache.dtype == torch.int8 else None
        shape = cell.kernels.cache_shape(blocks, block_size, cell.num_kv_heads, cell.head_size, storage)
        cell.cache = _cache(kv_cache, shape)


class CachedLatentLayer(AttentionLayerBase):
    """What vLLM sees of one `LatentAttention` cell: one row for each position, keys and values of all heads in it."""

    def __init__(self, cell: LatentAttention, dtype: torch.dtype) -> None:
        self.cell = cell
        self.dtype = dtype
        self.num_heads = cell.num_heads
        self.kv_cache = torch.empty(0)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return MindSporeAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        block_size = vllm_config.cache_config.block_size
        return MLAAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=self.cell.width, dtype=self.dtype)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """`kv_cache` is vLLM's `[blocks, 1, block_size, width]`; the cell sees our shape of it."""
        self.kv_cache = kv_cache
        blocks, _, block_size, width = kv_cache.shape
        shape = self.cell.kernels.latent_cache_shape(blocks, block_size, width)
        self.cell.cache = _cache(kv_cache, shape)


def _cache(kv_cache: torch.Tensor, shape: tuple[int, ...]) -> Any:
    """vLLM's tensor in our shape; where that has no memory (bridge/cache_memory.py), the device's own."""
    if kv_cache.is_meta:
        return kernels.get().new_cache(shape, ms.int8 if kv_cache.dtype == torch.int8 else DTYPES[kv_cache.dtype])
    return to_mindspore(kv_cache.view(shape))


class UncachedLayer(AttentionLayerBase):
    """What vLLM sees of all layers of an encoder: they keep no cache, but want to know the batch's sequences."""

    num_heads = 0

    def get_attn_backend(self) -> type[AttentionBackend]:
        return MindSporeAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> None:
        return None


def add_uncached_group(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """A group of an encoder's layers for the runner, which has metadata made for each group; without memory."""
    layers = get_layers_from_vllm_config(vllm_config, UncachedLayer)
    if layers:
        block_size = vllm_config.cache_config.block_size
        spec = EncoderOnlyAttentionSpec(block_size, num_kv_heads=1, head_size=1, dtype=vllm_config.model_config.dtype)
        kv_cache_config.kv_cache_groups.append(KVCacheGroupSpec(list(layers), spec))


def attend_both_ways(model: Cell, architecture: str) -> None:
    """Let all tokens of a decoder see their whole sequence, as `is_causal: false` in config.json asks."""
    for _, cell in model.cells_and_names():
        if isinstance(cell, LatentAttention) or (isinstance(cell, Attention) and cell.window is not None):
            kind = "sliding windows" if isinstance(cell, Attention) else "latent attention"
            raise ValueError(
                f"is_causal=False asks for attention in both directions, which is not supported for {architecture} "
                f"with {kind}; leave is_causal out of --hf-overrides, or serve another model."
            )
        if isinstance(cell, Attention):
            cell.causal = False


def cached_layer(cell: object, dtype: torch.dtype) -> CachedLayer | CachedLatentLayer | None:
    """The layer that vLLM allocates a cache for, if `cell` needs one."""
    if isinstance(cell, LatentAttention):
        return CachedLatentLayer(cell, dtype)
    return CachedLayer(cell, dtype) if isinstance(cell, Attention) else None
