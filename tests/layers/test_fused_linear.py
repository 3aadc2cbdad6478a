"""Linears whose parts are rows of one matrix of the checkpoint, and their adapters, against the parts one by one."""

import numpy as np
import pytest
import torch

from tests.layer_testing import (
    assert_close,
    back_end,  # noqa: F401 (autouse)
    call,
    context,
    linear,
    load,
    normal,
    on_ranks,
)
from vllm_ms_models.bridge.tensors import DTYPES, to_mindspore, to_torch
from vllm_ms_models.checkpoint.adapter import Factors
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.layers.batch import Adaptation, Batch
from vllm_ms_models.layers.linear import GatedColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear
from vllm_ms_models.layers.low_rank import LowRankWeights

INPUTS, SIZE, TOKENS, RANK = 37, 8, 5, 3
# Heads, KV heads, ranks: one, as many as KV heads, more than KV heads, several KV heads each.
CASES = [(6, 2, 1), (6, 3, 3), (8, 2, 4), (8, 4, 2), (4, 1, 4), (6, 2, 2)]


def arranged(parts: list[torch.Tensor], kv_heads: int, by_heads: bool) -> torch.Tensor:
    """One matrix, or one bias, of the rows of queries, keys and values."""
    if not by_heads:
        return torch.cat(parts)
    return torch.cat([part.reshape(kv_heads, -1, *part.shape[1:]) for part in parts], 1).flatten(0, 1)


def parts_of(heads: int, kv_heads: int, columns: int | None, seed: int) -> list[torch.Tensor]:
    rest = () if columns is None else (columns,)
    return [normal(seed + part, count * SIZE, *rest) for part, count in enumerate((heads, kv_heads, kv_heads))]


def own_rows(heads: int, kv_heads: int, rank: int, size: int) -> list[slice]:
    """The rows of queries, keys and values that a rank has."""
    share = heads // size
    first = rank * share // (heads // kv_heads)
    kv_share = max(1, kv_heads // size)
    kv = slice(first * SIZE, (first + kv_share) * SIZE)
    return [slice(rank * share * SIZE, (rank + 1) * share * SIZE), kv, kv]


@pytest.mark.parametrize("by_heads", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), CASES)
def test_queries_keys_and_values(heads: int, kv_heads: int, size: int, by_heads: bool) -> None:
    weights, biases = parts_of(heads, kv_heads, INPUTS, 0), parts_of(heads, kv_heads, None, 3)
    tensors = {"qkv.weight": arranged(weights, kv_heads, by_heads), "qkv.bias": arranged(biases, kv_heads, by_heads)}
    x = normal(9, TOKENS, INPUTS)

    def run(group: Group) -> tuple[torch.Tensor, ...]:
        given = context(group=group)
        cell = QKVParallelLinear("qkv", INPUTS, heads, kv_heads, SIZE, given, True, by_heads)
        load(cell, tensors)
        return call(cell, x)

    for rank, results in enumerate(on_ranks(size, run)):
        for part, rows in enumerate(own_rows(heads, kv_heads, rank, size)):
            want = linear(x, weights[part][rows], biases[part][rows])
            assert_close(results[part], *want, torch.float32)


@pytest.mark.parametrize("by_heads", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), CASES)
def test_adapters(heads: int, kv_heads: int, size: int, by_heads: bool) -> None:
    """An adapter has one pair of matrices for the whole; every part gets its rows of the second."""
    weights, ups = parts_of(heads, kv_heads, INPUTS, 0), parts_of(heads, kv_heads, RANK, 3)
    down, x = normal(7, RANK, INPUTS), normal(9, TOKENS, INPUTS)
    adapter = {"down": down, "up": arranged(ups, kv_heads, by_heads)}
    everyone = to_mindspore(torch.zeros(TOKENS, dtype=torch.int32))
    batch = Batch(to_mindspore(torch.arange(TOKENS)), {}, Adaptation((1,), everyone))

    def run(group: Group) -> tuple[torch.Tensor, ...]:
        cell = QKVParallelLinear("qkv", INPUTS, heads, kv_heads, SIZE, context(group=group), by_heads=by_heads)
        load(cell, {"qkv.weight": arranged(weights, kv_heads, by_heads)})
        factors = [Factors("down", "up", RANK, 0.5)] * len(cell.scheme.parts)
        matrices = LowRankWeights(cell.scheme.parts, factors, DTYPES[torch.float32])
        load(matrices, adapter)
        cell.adapters[1] = matrices.result
        return tuple(map(to_torch, cell(to_mindspore(x), batch)))

    for rank, results in enumerate(on_ranks(size, run)):
        for part, rows in enumerate(own_rows(heads, kv_heads, rank, size)):
            both = weights[part][rows].double() + 0.5 * ups[part][rows].double() @ down.double()
            want, error = linear(x, both, None)
            # The two products are summed one after the other; the magnitudes of the second are not within the first's.
            extra = linear(x.abs(), ups[part][rows].abs().double() @ down.abs().double(), None)[1]
            assert_close(results[part], want, 2 * (error + extra), torch.float32)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gate_and_up(size: int) -> None:
    """Each rank has its share of both."""
    gate, up, x = normal(0, 12, INPUTS), normal(1, 12, INPUTS), normal(2, TOKENS, INPUTS)
    tensors = {"gate_up.weight": torch.cat([gate, up])}

    def merged(group: Group) -> tuple[torch.Tensor, ...]:
        cell = MergedColumnParallelLinear("gate_up", INPUTS, (12, 12), context(group=group))
        load(cell, tensors)
        return call(cell, x)

    def gated(group: Group) -> torch.Tensor:
        cell = GatedColumnParallelLinear("gate_up", INPUTS, 12, "silu", context(group=group))
        load(cell, tensors)
        return call(cell, x)

    for weight, parts in zip((gate, up), zip(*on_ranks(size, merged), strict=True), strict=True):
        assert_close(torch.cat(parts, 1), *linear(x, weight, None), torch.float32)
    want = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    found = torch.cat(on_ranks(size, gated), 1)
    np.testing.assert_allclose(found.numpy(), want.numpy(), rtol=1e-4, atol=1e-4)
