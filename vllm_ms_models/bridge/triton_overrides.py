"""CPU versions of the Triton kernels that vLLM's runner launches, given to vLLM's own override registry."""

import functools
import warnings

import numpy as np
import torch
from vllm.triton_utils.dispatcher import register_kernels

from vllm_ms_models.bridge import speculation_kernels


def compute_slot_mapping(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    slot_mapping_ptr: torch.Tensor,
    KV_CACHE_BLOCK_SIZE: int,  # noqa: N803 (the kernel's own argument names)
    TOTAL_CP_WORLD_SIZE: int,  # noqa: N803
    TOTAL_CP_RANK: int,  # noqa: N803
    CP_KV_CACHE_INTERLEAVE_SIZE: int,  # noqa: N803
    PAD_ID: int,  # noqa: N803
    BLOCK_SIZE: int,  # noqa: N803
) -> None:
    """Slot of each token: its sequence's block at position // block size, times block size, plus the offset.

    `query_start_loc_ptr` int32 `[sequences + 1]`, `positions_ptr` int64 `[tokens]`, `block_table_ptr` int32
    `[rows, blocks]`; `slot_mapping_ptr` int64 `[max_num_tokens]` is filled, PAD_ID beyond the tokens.
    """
    starts, table = query_start_loc_ptr.numpy(), block_table_ptr.numpy()  # a third of the time torch takes
    slots = slot_mapping_ptr.numpy()
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))[:num_tokens]
    tokens = len(rows)
    blocks, offsets = np.divmod(positions_ptr.numpy()[:tokens], KV_CACHE_BLOCK_SIZE)
    slots[:tokens] = table[rows, blocks].astype(np.int64) * KV_CACHE_BLOCK_SIZE + offsets
    slots[tokens:max_num_tokens] = PAD_ID


@functools.cache
def register() -> None:
    """Called by vLLM while it builds a model runner, before any launch; once is enough for a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it looks at every attribute of every module
        register_kernels(
            {"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slot_mapping}
            | speculation_kernels.KERNELS
        )
