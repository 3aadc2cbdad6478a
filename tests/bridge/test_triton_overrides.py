"""The CPU version of vLLM's slot-mapping kernel, against the definition and as vLLM launches it."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.worker import block_table

from vllm_ms_models.bridge import triton_overrides
from vllm_ms_models.bridge.triton_overrides import compute_slot_mapping

PAD = -1
UNTOUCHED = -777
KERNEL = block_table.ComputeSlotMappingKernel


def slots_by_loop(starts: np.ndarray, positions: np.ndarray, table: np.ndarray, block_size: int) -> list[int]:
    """Token by token."""
    slots = []
    for sequence in range(len(starts) - 1):
        for token in range(starts[sequence], starts[sequence + 1]):
            block, offset = divmod(int(positions[token]), block_size)
            slots.append(int(table[sequence, block]) * block_size + offset)
    return slots


def arrays(rng: np.random.Generator, counts: list[int], block_size: int, blocks: int, spare: int) -> Any:
    """Query starts, positions (from anywhere in a sequence) and a table with rows of sequences that do not run."""
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    length = blocks * block_size
    firsts = [rng.integers(0, length - count + 1) for count in counts]
    parts = [np.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)]
    positions = np.concatenate((np.arange(0), *parts))
    table = rng.integers(0, 2**31 // block_size - 1, (len(counts) + spare, blocks))
    return starts, positions.astype(np.int64), table.astype(np.int32)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 12), max_size=6),
    st.sampled_from((1, 2, 5, 16, 32, 128)),
    st.integers(0, 3),
    st.integers(0, 9),
    st.integers(0, 5),
)
def test_against_the_definition(
    seed: int, counts: list[int], block_size: int, spare: int, padding: int, beyond: int
) -> None:
    """Slots up to 2^31 tokens; PAD after the last token; nothing is written behind max_num_tokens."""
    starts, positions, table = arrays(np.random.default_rng(seed), counts, block_size, -(-24 // block_size), spare)
    tokens = len(positions)
    mapping = torch.full((tokens + padding + beyond,), UNTOUCHED, dtype=torch.int64)
    compute_slot_mapping(
        num_tokens=tokens,
        max_num_tokens=tokens + padding,
        query_start_loc_ptr=torch.from_numpy(starts),
        positions_ptr=torch.from_numpy(positions),
        block_table_ptr=torch.from_numpy(table),
        block_table_stride=table.shape[1],
        slot_mapping_ptr=mapping,
        KV_CACHE_BLOCK_SIZE=block_size,
        TOTAL_CP_WORLD_SIZE=1,
        TOTAL_CP_RANK=0,
        CP_KV_CACHE_INTERLEAVE_SIZE=1,
        PAD_ID=PAD,
        BLOCK_SIZE=1024,
    )
    want = slots_by_loop(starts, positions, table, block_size)
    assert mapping.tolist() == want + [PAD] * padding + [UNTOUCHED] * beyond


def test_the_arguments_have_the_names_of_the_kernel() -> None:
    """vLLM passes them by name only then; by position, a new argument would go to the wrong one."""
    ours = list(inspect.signature(compute_slot_mapping).parameters)
    source = inspect.getsource(KERNEL)
    declared = source.split("def kernel(")[1].split("):")[0].splitlines()
    names = [line.split("#")[0].split(":")[0].strip(" ,") for line in declared]
    assert ours == [name for name in names if name]


@pytest.mark.parametrize("block_size", [4, 32])
def test_vllm_launches_it(block_size: int) -> None:
    """vLLM's own `BlockTable`, with the override in place of the Triton kernel."""
    triton_overrides.register()
    triton_overrides.register()  # a second runner in the same process
    table = block_table.BlockTable(
        block_size=block_size,
        max_num_reqs=3,
        max_num_blocks_per_req=8,
        max_num_batched_tokens=20,
        pin_memory=False,
        device=torch.device("cpu"),
        cp_kv_cache_interleave_size=1,
    )
    table.add_row([5, 3, 9], 0)
    table.add_row([7], 1)
    table.commit_block_table(2)
    positions = torch.tensor([*range(3, 8), 2])
    starts = torch.tensor([0, 5, 6], dtype=torch.int32)
    table.compute_slot_mapping(2, starts, positions)
    want = slots_by_loop(starts.numpy(), positions.numpy(), table.block_table.gpu.numpy(), block_size)
    assert table.slot_mapping.gpu.tolist() == want + [-1] * 14
