"""The fused operators' meaning in stock MindSpore operators that a CPU has within a graph, in float32."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from tests.ascend.contract import copied, write_rows
from tests.ascend.contract import copied as to_host
from tests.ascend.standin_experts import integers_of


def to_device(x: Tensor) -> Tensor:
    """Two integers of a byte apart: no operator of a CPU takes them together."""
    return Tensor(integers_of(x).astype(np.int8)) if x.dtype == ms.qint4x2 else copied(x)


def memory() -> tuple[int, int]:
    return 2 << 30, 1 << 30


def argmax(x: Tensor) -> Tensor:
    return ops.argmax(x, -1).astype(ms.int64)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    return ops.MatMul(transpose_b=True)(x, weight)


def gather(table: Tensor, rows: Tensor) -> Tensor:
    return ops.Gather()(table, rows, 0)


def swiglu(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    gate, up = x[:, :half], x[:, half:]
    return gate * ops.sigmoid(gate) * up


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return x * ops.rsqrt(ops.ReduceMean(True)(x * x, (-1,)) + eps) * gamma


def add_rms_norm(x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> Any:
    total = x + residual
    return rms_norm(total, gamma, eps), total


def apply_rotary_pos_emb(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> Any:
    return _turned(query, cos, sin), _turned(key, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size, features = cos.shape[1], x.shape[1]
    heads = x.reshape(-1, features // size, size)
    first, second = heads[:, :, : size // 2], heads[:, :, size // 2 :]
    halves = ops.concat((-second, first), 2)
    return (heads * ops.expand_dims(cos, 1) + halves * ops.expand_dims(sin, 1)).reshape(-1, features)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    off = x - ops.ReduceMean(True)(x, (-1,))
    return off * ops.rsqrt(ops.ReduceMean(True)(off * off, (-1,)) + eps) * gamma + beta


def silu(x: Tensor) -> Tensor:
    return x * ops.sigmoid(x)


def gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1.0 + ops.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1.0 + ops.erf(x * 0.7071067811865476))


def relu(x: Tensor) -> Tensor:
    return ops.relu(x)


def sigmoid(x: Tensor) -> Tensor:
    return ops.sigmoid(x)


def quantize(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return _int8(x * scale + offset)


def quantize_by_token(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = ops.ReduceMax(True)(ops.abs(x), (-1,))
    return _int8(x * (127.0 / largest)), (largest / 127.0).reshape(-1)


def _int8(x: Tensor) -> Tensor:
    """Whole numbers from -128 to 127, in float32, in which sums of their products are exact here."""
    return ops.clamp(ops.Rint()(x), -128.0, 127.0)


def quant_matmul(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, token_scales: Any, dtype: Any) -> Tensor:
    product = (matmul(x, weight.astype(ms.float32)) + bias.astype(ms.float32)) * scale
    return product if token_scales is None else product * token_scales.reshape(-1, 1)


def weight_quant_matmul(x: Tensor, weight: Tensor, scale: Tensor, offset: Any, group_size: int) -> Tensor:
    return ops.matmul(x, widened(weight, scale, offset, group_size))


def widened(weight: Tensor, scale: Tensor, offset: Any, group_size: int) -> Tensor:
    """`[in, out]` in floats, of a scale for each of the outputs or for each group of inputs."""
    inputs, outputs = weight.shape
    size = group_size or inputs
    values = weight.astype(ms.float32)
    values = values if offset is None else values + _of_inputs(offset, size, outputs)[:inputs]
    return values * _of_inputs(scale, size, outputs)[:inputs]


def _of_inputs(rows: Tensor, size: int, outputs: int) -> Tensor:
    """Rows of groups of `size` inputs, one for each input."""
    groups = rows.reshape(-1, 1, outputs)
    return ops.broadcast_to(groups, (groups.shape[0], size, outputs)).reshape(-1, outputs)


def batch_matmul(x: Tensor, y: Tensor, transposed: bool) -> Tensor:
    return ops.BatchMatMul(False, transposed)(x, y)


def reshape_and_cache(key: Tensor, value: Any, key_cache: Tensor, value_cache: Any, slots: Tensor) -> None:
    block, heads, size = key_cache.shape[1], key_cache.shape[2], key_cache.shape[3]
    offsets = slots % block
    places = ops.stack((((slots - offsets).astype(ms.float32) / block).astype(ms.int32), offsets), 1)
    ops.ScatterNdUpdate()(key_cache, places, key.reshape(-1, heads, size))
    if value is not None:
        ops.ScatterNdUpdate()(value_cache, places, value.reshape(-1, heads, size))


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    mask: Any,
    query_lens: Any,
    heads: int,
    kv_heads: int,
    scale: float,
    mla_v_dim: int,
) -> Tensor:
    block, size = keys.shape[1], keys.shape[3]
    group, width = heads // kv_heads, tables.shape[1] * block
    of_rows = _sequences(query, tables if query_lens is None else query_lens, query_lens is None)
    blocks = gather(tables, of_rows).reshape(-1)
    k = gather(keys, blocks).reshape(-1, width, kv_heads, size)
    v = gather(values, blocks).reshape(-1, width, kv_heads, size)
    v = v[..., :mla_v_dim] if mla_v_dim else v
    q = query.reshape(-1, kv_heads, group, size)
    scores = ops.matmul(q, k.transpose(0, 2, 3, 1)) * scale  # [rows, kv_heads, group, width]
    known = numbers(k[0, :, 0, 0]).reshape(1, -1) < gather(lengths.astype(ms.float32).reshape(-1, 1), of_rows)
    scores = _where(known.reshape(-1, 1, 1, width), scores)
    if mask is not None:
        longest = mask.shape[1]
        scores = scores[..., :longest] + mask.reshape(-1, 1, 1, longest)
        v = v[:, :longest]
    sums = ops.matmul(_shares(scores), v.transpose(0, 2, 1, 3))
    return sums.reshape(-1, heads * (mla_v_dim or size))


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, query_lens: Tensor, key_lens: Tensor, heads: int, scale: float
) -> Tensor:
    """A causal one, of sequences whose rows are all they see."""
    rows = query.shape[0]
    size = query.shape[1] // heads
    kv_heads = key.shape[1] // size
    q = query.reshape(-1, kv_heads, heads // kv_heads, size).transpose(1, 2, 0, 3)
    k = key.reshape(-1, kv_heads, 1, size).transpose(1, 2, 3, 0)
    v = value.reshape(-1, kv_heads, 1, size).transpose(1, 2, 0, 3)
    own = _sequences(query, query_lens, False).reshape(-1, 1)
    places = numbers(query[:, 0]).reshape(-1, 1)
    seen = ops.logical_and(own == own.reshape(1, -1), places >= places.reshape(1, -1))
    scores = _where(seen.reshape(1, 1, rows, rows), ops.matmul(q, k) * scale)
    return ops.matmul(_shares(scores), v).transpose(2, 0, 1, 3).reshape(-1, heads * size)


def _where(seen: Tensor, scores: Tensor) -> Tensor:
    return ops.select(ops.broadcast_to(seen, scores.shape), scores, ops.full_like(scores, -1e30))


def _shares(scores: Tensor) -> Tensor:
    """softmax of the last axis."""
    powers = ops.exp(scores - ops.ReduceMax(True)(scores, (-1,)))
    return powers / ops.ReduceSum(True)(powers, (-1,))


def numbers(x: Tensor) -> Tensor:
    """0, 1, 2 ... in float32, as many as `x` has."""
    return ops.cumsum(ops.ones_like(x).astype(ms.float32), 0) - 1.0


def _sequences(query: Tensor, lengths: Tensor, decoding: bool) -> Tensor:
    """Which sequence each row of `query` is of, int32."""
    rows = numbers(query[:, 0])
    if decoding:
        return rows.astype(ms.int32)
    return stretches(rows, lengths)


def stretches(rows: Tensor, lengths: Tensor) -> Tensor:
    """Which of the stretches with these lengths each of `rows` lies in, int32."""
    ends = ops.cumsum(lengths.astype(ms.float32), 0)
    passed = (rows.reshape(-1, 1) >= ends.reshape(1, -1)).astype(ms.float32)
    return (ops.ReduceSum()(passed, (-1,)) + 0.5).astype(ms.int32)


__all__ = ["to_host", "write_rows"]
