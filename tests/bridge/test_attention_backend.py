"""vLLM's description of a step -> ours, and the cache on its way to the cells: shared, never copied."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata, MultipleOf
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
    compute_layer_kv_cache_shape_bytes,
)

from tests.layer_testing import context
from vllm_ms_models import kernels
from vllm_ms_models.bridge.attention_backend import (
    CachedLatentLayer,
    CachedLayer,
    MetadataBuilder,
    MindSporeAttentionBackend,
    cached_layer,
)
from vllm_ms_models.bridge.tensors import to_torch
from vllm_ms_models.kernels.reference import ReferenceKernels
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.mla import LatentAttention, LatentHeads

CONFIG: Any = SimpleNamespace(cache_config=SimpleNamespace(block_size=16, cache_dtype="auto"))
INT8: Any = SimpleNamespace(cache_config=SimpleNamespace(block_size=16, cache_dtype="int8_per_token_head"))


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_active", ReferenceKernels())


@dataclass
class Buffers:
    """The runner's buffers, larger than a step needs."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


def buffers() -> Buffers:
    return Buffers(
        torch.tensor([0, 5, 6, 9, 9, 9, 9], dtype=torch.int32),
        torch.tensor([5, 40, 17, 0, 0, 0], dtype=torch.int32),
        torch.arange(24, dtype=torch.int32).reshape(6, 4),
        torch.arange(100, 132, dtype=torch.int64),
    )


def metadata(step: Buffers, sequences: int, tokens: int) -> CommonAttentionMetadata:
    starts = step.query_start_loc[: sequences + 1]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=step.seq_lens[:sequences],
        num_reqs=sequences,
        num_actual_tokens=tokens,
        max_query_len=5,
        max_seq_len=40,
        block_table_tensor=step.block_table[:sequences],
        slot_mapping=step.slot_mapping,
    )


def builder() -> MetadataBuilder:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
    return MetadataBuilder(spec, ["a", "b"], CONFIG, torch.device("cpu"))


@pytest.mark.parametrize(("sequences", "tokens"), [(3, 9), (1, 5)])
def test_a_step_is_shared(sequences: int, tokens: int) -> None:
    """Four tensors, in the memory in which the runner keeps them, and two numbers."""
    step = buffers()
    view = builder().build(0, metadata(step, sequences, tokens))
    paged = view.sequences
    shared = [
        (paged.query_start, step.query_start_loc[: sequences + 1], ms.int32),
        (paged.seq_lens, step.seq_lens[:sequences], ms.int32),
        (paged.block_tables, step.block_table[:sequences], ms.int32),
        (view.slots, step.slot_mapping[:tokens], ms.int64),
    ]
    for ours, theirs, dtype in shared:
        assert ours.dtype == dtype
        assert ours.data_ptr() == theirs.data_ptr()
        assert torch.equal(to_torch(ours), theirs)
    assert (paged.max_query_len, paged.max_seq_len, paged.num_sequences) == (5, 40, sequences)


def test_the_next_step_is_seen_through_the_shared_memory() -> None:
    step = buffers()
    view = builder().build(0, metadata(step, 3, 9))
    step.slot_mapping.add_(1000)
    assert view.slots.asnumpy().tolist() == list(range(1100, 1109))


# --- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cache_reaches_the_cell(dtype: torch.dtype) -> None:
    cell = Attention("layer", 4, 2, 8)
    layer = CachedLayer(cell, dtype)
    cache = torch.zeros(5, 2, 16, 16, dtype=dtype)
    layer.bind_kv_cache(cache)
    assert cell.cache is not None
    assert cell.cache.data_ptr() == cache.data_ptr() == layer.kv_cache.data_ptr()
    assert cell.cache.shape == cell.kernels.cache_shape(5, 16, 2, 8)
    # A block of ours is a block of vLLM's: blocks are copied, swapped and freed whole.
    to_torch(cell.cache)[3] = 1
    assert [bool(block.any()) for block in cache] == [False, False, False, True, False]
    assert bool(cache[3].all())


def test_what_the_cache_manager_is_asked_for() -> None:
    """The bytes of a block are those of our layout; a window is told, so that blocks before it are freed."""
    full = CachedLayer(Attention("a", 4, 2, 8), torch.bfloat16).get_kv_cache_spec(CONFIG)
    assert isinstance(full, FullAttentionSpec)
    assert (full.block_size, full.num_kv_heads, full.head_size, full.dtype) == (16, 2, 8, torch.bfloat16)
    shape = kernels.get().cache_shape(1, 16, 2, 8)
    assert full.page_size_bytes == torch.Size(shape).numel() * 2
    window = CachedLayer(Attention("b", 4, 2, 8, window=100), torch.bfloat16).get_kv_cache_spec(CONFIG)
    assert isinstance(window, SlidingWindowSpec)
    assert window.sliding_window == 100
    assert window.page_size_bytes == full.page_size_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_latents(dtype: torch.dtype) -> None:
    """A row of latent and rotated key for each position, and nothing else; vLLM's tensor reaches the cell whole."""
    cell = LatentAttention("a", LatentHeads("b", 4, 32, 8, 8, context(dtype)), 8, 1.0)
    layer = cached_layer(cell, dtype)
    assert isinstance(layer, CachedLatentLayer)
    spec = layer.get_kv_cache_spec(CONFIG)
    assert isinstance(spec, MLAAttentionSpec)
    assert spec.page_size_bytes == 16 * 40 * dtype.itemsize
    cache = torch.zeros(compute_layer_kv_cache_shape_bytes(spec, 5), dtype=torch.int8).view(dtype)
    layer.bind_kv_cache(cache)
    assert cell.cache is not None
    assert cell.cache.shape == cell.kernels.latent_cache_shape(5, 16, 40)
    assert cell.cache.data_ptr() == cache.data_ptr() == layer.kv_cache.data_ptr()
    to_torch(cell.cache)[3] = 1
    assert [bool(block.any()) for block in cache] == [False, False, False, True, False]
    assert isinstance(cached_layer(Attention("b", 4, 2, 8), dtype), CachedLayer)
    assert cached_layer(object(), dtype) is None


@pytest.mark.parametrize("window", [None, 100])
def test_a_cache_of_int8(window: int | None) -> None:
    """vLLM's own bytes of a block, in its own mode, and the tensor that it makes of them reaches the cell whole."""
    cell = Attention("a", 4, 2, 8, window=window)
    layer = CachedLayer(cell, torch.bfloat16)
    spec = layer.get_kv_cache_spec(INT8)
    assert isinstance(spec, AttentionSpec)
    assert (spec.dtype, spec.kv_quant_mode) == (torch.int8, KVQuantMode.INT8_PER_TOKEN_HEAD)
    assert spec.page_size_bytes == 2 * 2 * 16 * (8 + 4)
    assert getattr(spec, "sliding_window", None) == window
    cache = torch.zeros(compute_layer_kv_cache_shape_bytes(spec, 5), dtype=torch.int8)
    layer.bind_kv_cache(cache)
    assert cell.cache is not None
    assert cell.cache.dtype == ms.int8
    assert cell.cache.shape == cell.kernels.cache_shape(5, 16, 2, 8, ms.int8)
    assert cell.cache.data_ptr() == cache.data_ptr()
    # A block of ours is a block of vLLM's.
    ones = ms.Tensor(np.ones((16, 16), np.float32))
    cell.kernels.write_kv(ones, ones, cell.cache, ms.Tensor(np.arange(48, 64)))
    assert [bool(block.any()) for block in cache] == [False, False, False, True, False]


def test_block_sizes() -> None:
    """Every back end takes what vLLM is told; the C++ kernels nothing else."""
    assert MindSporeAttentionBackend.get_supported_kernel_block_sizes() == [MultipleOf(16)]
    assert MindSporeAttentionBackend.supports_block_size(48)
    assert not MindSporeAttentionBackend.supports_block_size(8)


def test_the_layout_keeps_a_block_in_one_piece() -> None:
    assert MindSporeAttentionBackend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)
    assert MindSporeAttentionBackend.get_builder_cls() is MetadataBuilder
    assert CachedLayer(Attention("a", 4, 2, 8), torch.float32).get_attn_backend() is MindSporeAttentionBackend
