"""Paged attention over several steps against torch's scaled_dot_product_attention over whole sequences."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.references import share_error
from tests.layer_testing import (
    UNIT,
    assert_close,
    back_end,  # noqa: F401 (autouse)
    dtypes,
    examples,
    seeds,
)
from vllm_ms_models.bridge.tensors import DTYPES, to_mindspore, to_torch
from vllm_ms_models.kernels import PagedSequences
from vllm_ms_models.kernels.cpu import CpuKernels
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch, CacheView

BLOCKS = 120
NAME = "model.layers.0.self_attn.attn"


@dataclass
class Sequence:
    """What is known of a sequence outside the cache: its keys and values `[tokens, heads, head_size]`, its blocks."""

    keys: torch.Tensor
    values: torch.Tensor
    table: list[int] = field(default_factory=list)


class Cache:
    """A cache manager: gives out blocks in no order; what no token was written to is NaN."""

    def __init__(self, seed: int, cell: Attention, block_size: int, dtype: torch.dtype) -> None:
        if isinstance(cell.kernels, CpuKernels):
            block_size = -(-block_size // 16) * 16
        self.cell, self.block_size, self.dtype = cell, block_size, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.free = torch.randperm(BLOCKS, generator=self.generator).tolist()
        shape = cell.kernels.cache_shape(BLOCKS, block_size, cell.num_kv_heads, cell.head_size)
        self.memory = torch.full(shape, float("nan"), dtype=dtype)
        cell.cache = to_mindspore(self.memory)
        self.sequences: dict[str, Sequence] = {}

    def random(self, tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, self.cell.head_size, generator=self.generator).to(self.dtype)

    def append(self, name: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """New tokens of a sequence: their keys, values and slots."""
        new = [self.random(tokens, self.cell.num_kv_heads) for _ in range(2)]
        known = self.sequences.setdefault(name, Sequence(*(x[:0] for x in new)))
        first = len(known.keys)
        known.keys, known.values = torch.cat([known.keys, new[0]]), torch.cat([known.values, new[1]])
        while len(known.table) * self.block_size < len(known.keys):
            known.table.append(self.free.pop())
        positions = range(first, first + tokens)
        slots = [known.table[p // self.block_size] * self.block_size + p % self.block_size for p in positions]
        return new[0], new[1], torch.tensor(slots, dtype=torch.int64)

    def step(self, counts: dict[str, int]) -> None:
        """One batch with so many new tokens of each sequence, checked row by row."""
        lengths = list(counts.values())
        queries = self.random(sum(lengths), self.cell.num_heads)
        keys, values, slots = map(torch.cat, zip(*(self.append(*item) for item in counts.items()), strict=True))
        view = CacheView(self.paged(counts), to_mindspore(slots))
        rows = (to_mindspore(x.reshape(len(x), -1)) for x in (queries, keys, values))
        batch = Batch(to_mindspore(torch.zeros(len(queries), dtype=torch.int64)), {NAME: view})
        got = to_torch(self.cell(*rows, batch))
        for name, query, result in zip(counts, queries.split(lengths), got.split(lengths), strict=True):
            known = self.sequences[name]
            want, error = expected(self.cell, query, known.keys, known.values)
            assert_close(result, want, error, self.dtype)

    def paged(self, counts: dict[str, int]) -> PagedSequences:
        """As vLLM describes a batch; entries of blocks not needed (any more) are those of no block."""
        chosen = [self.sequences[name] for name in counts]
        tables = torch.full((len(chosen), max(len(known.table) for known in chosen) + 1), -1, dtype=torch.int32)
        for row, known, new in zip(tables, chosen, counts.values(), strict=True):
            row[: len(known.table)] = torch.tensor(known.table)
            if self.cell.window is not None:
                row[: max(0, len(known.keys) - new - self.cell.window + 1) // self.block_size] = -1
        starts = torch.tensor([0, *counts.values()]).cumsum(0).int()
        lengths = torch.tensor([len(known.keys) for known in chosen]).int()
        query_start, seq_lens, block_tables = map(to_mindspore, (starts, lengths, tables))
        return PagedSequences(query_start, seq_lens, block_tables, max(counts.values()), int(lengths.max()))


def expected(
    cell: Attention, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool = True
) -> Any:
    """torch's attention of the last rows of a sequence in float64, and the error of float32.

    A score is a sum of head_size products, off by `off`; tanh adds 32 units of the cap. exp of a distance z from the
    largest score is off by a relative (64 + 8 |z|) units and by what both scores are off by. The shares are these,
    divided by a sum that is off as the average of them; the result is a sum with the shares. Where these are rounded to
    bfloat16 (`share_error`), only how far the values are from the result is multiplied by that error.
    """
    groups = cell.num_heads // cell.num_kv_heads
    q, k, v = (x.double().transpose(0, 1) for x in (query, keys, values))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    rows = torch.arange(len(keys) - len(query), len(keys))[:, None]
    columns = torch.arange(len(keys))
    mask = (columns <= rows) | (not causal)
    if cell.window is not None:
        mask &= columns > rows - cell.window
    scores = q @ k.mT * cell.scale
    off = (cell.head_size + 2) * UNIT * (q.abs() @ k.abs().mT) * abs(cell.scale)
    if cell.soft_cap is not None:
        scores = torch.tanh(scores / cell.soft_cap) * cell.soft_cap
        off += 32 * UNIT * cell.soft_cap
    scores = scores.masked_fill(~mask, -torch.inf)
    shares = scores.softmax(-1)
    want = shares @ v
    if cell.soft_cap is None:  # what the name of this file's first line says; the shares are for the error
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=cell.scale)
    below = (scores.amax(-1, True) - scores).masked_fill(~mask, 0)
    largest = off.masked_fill(~mask, 0).amax(-1, True)
    relative = off + largest + (65 + 9 * below + scores.masked_fill(~mask, 0).abs()) * UNIT
    relative = relative + (shares * relative).sum(-1, True) + (2 * len(keys) + 4) * UNIT
    share = share_error(cell.kernels, DTYPES[query.dtype])
    spread = (shares.unsqueeze(-1) * (v.unsqueeze(1) - want.unsqueeze(2)).abs()).sum(2)
    error = (shares * relative) @ v.abs() + share / (1 - share) * spread
    return tuple(x.transpose(0, 1).reshape(len(query), -1) for x in (want, error))


STEPS: list[dict[str, int]] = [
    {"a": 7, "b": 1},  # prefill
    {"c": 19, "a": 5, "b": 1},  # prefill, a chunk, and decode
    {"a": 1, "b": 1, "c": 1},  # decode
    {"b": 9, "a": 1},  # some tokens at once (as after speculation), and one sequence waits
    {"c": 1, "d": 40, "b": 1},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size", "window", "soft_cap"),
    [
        (4, 4, 64, 16, None, None),
        (6, 2, 20, 5, None, None),
        (8, 1, 8, 32, None, None),
        (7, 1, 128, 16, 6, None),
        (4, 2, 17, 1, 1, None),
        (4, 2, 16, 4, None, 3.0),
        (2, 1, 48, 3, 10, 5.0),
    ],
)
def test_life_of_sequences(dtype, heads, kv_heads, head_size, block_size, window, soft_cap):
    cell = Attention(NAME, heads, kv_heads, head_size, window=window, soft_cap=soft_cap)
    assert cell.scale == head_size**-0.5
    cache = Cache(0, cell, block_size, dtype)
    for counts in STEPS:
        cache.step(counts)


@examples
@given(
    seeds,
    dtypes,
    st.sampled_from([(1, 1), (3, 3), (6, 2), (8, 1)]),
    st.sampled_from((4, 12, 33)),
    st.sampled_from((1, 5, 16)),
    st.sampled_from((None, 1, 4, 30)),
    st.sampled_from((None, 2.0)),
    st.sampled_from((None, 0.0, 1.0)),
    st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(1, 12), min_size=1), min_size=1, max_size=3),
)
def test_any_batches(seed, dtype, heads, head_size, block_size, window, soft_cap, scale, steps):
    cell = Attention(NAME, heads[0], heads[1], head_size, scale, window, soft_cap)
    cache = Cache(seed, cell, block_size, dtype)
    for counts in steps:
        cache.step(counts)


def test_only_its_slots_of_the_cache_are_written():
    cell = Attention(NAME, 2, 1, 8)
    cache = Cache(0, cell, 16, torch.float32)
    cache.step({"a": 20})
    full = ~cache.memory.isnan().flatten(1).any(1)
    assert full.nonzero().flatten().tolist() == [cache.sequences["a"].table[0]]
    assert int(cache.memory.isnan().logical_not().sum()) == 20 * 2 * 8


def test_layers_with_different_windows_have_different_block_tables():
    """A layer takes its own view of the batch, by its name."""
    first, second = Attention("layers.0.attn", 2, 2, 8), Attention("layers.1.attn", 2, 2, 8)
    caches = [Cache(seed, cell, 4, torch.float32) for seed, cell in enumerate((first, second))]
    query = caches[0].random(5, 2)
    views, states = {}, []
    for cache in caches:
        keys, values, slots = cache.append("a", 5)
        states.append((keys, values))
        views[cache.cell.name] = CacheView(cache.paged({"a": 5}), to_mindspore(slots))
    assert caches[0].sequences["a"].table != caches[1].sequences["a"].table
    batch = Batch(to_mindspore(torch.arange(5)), views)
    for cache, (keys, values) in zip(caches, states, strict=True):
        rows = [to_mindspore(x.reshape(5, -1)) for x in (query, keys, values)]
        want, error = expected(cache.cell, query, keys, values)
        assert_close(to_torch(cache.cell(*rows, batch)), want, error, torch.float32)
