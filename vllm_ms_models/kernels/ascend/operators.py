"""Every operator call of the Ascend back end, one function for each operator. **Not run on hardware.**

Arguments and results are those of MindSpore 2.10's primitives (`mindspore.ops.auto_generate`), with what this back end
never uses left out. On a CPU most of them end in "The kernel X unregistered", after MindSpore has checked arguments and
dtypes; tests/ascend checks every call that way. `AscendKernels` takes any object with these functions, so that tests
can put in one that computes what the operators mean.

Lengths, tables and slots are int32; floats are float16 or bfloat16 unless a function says otherwise. Nothing here is
called for an empty batch.
"""

from functools import lru_cache
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint
from mindspore.ops.auto_generate import gen_ops_prim as primitives


@lru_cache(maxsize=256)
def _primitive(name: str, *arguments: Any, **options: Any) -> Any:
    """Primitives are made once: making one costs more than calling it."""
    return getattr(primitives, name)(*arguments, **options)


# Their writing is all that they are for. Of a primitive that a function gives, as above, a graph's compiler does not
# see that it writes; and as the result is not used either, it leaves it out without a word.
_RESHAPE_AND_CACHE = primitives.ReshapeAndCache()
_INDEX_PUT = primitives.InplaceIndexPut()


# --- memory ----------------------------------------------------------------------------------------------------


def to_device(x: Tensor) -> Tensor:
    """A copy of a host's tensor on the device; the host's may change at once."""
    return x.to("Ascend", copy=True)


def to_host(x: Tensor) -> Tensor:
    """A copy in the host's memory of what the device has computed once all before is done."""
    return x.to("CPU", copy=True)


def memory() -> tuple[int, int]:
    """Bytes of this process's device: all, and what is left."""
    properties = ms.hal.get_device_properties(0, "Ascend")  # the number is ignored
    return properties.total_memory, properties.free_memory


def write_rows(target: Tensor, first: int, rows: Tensor) -> None:
    """Copy `rows` to `target[first : first + len(rows)]`. (A CPU's InplaceCopy takes no part of a tensor.)"""
    mint.narrow(target, 0, first, rows.shape[0]).copy_(rows)


# --- dense -----------------------------------------------------------------------------------------------------


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`[tokens, in]` and `[out, in]`, of one dtype (float32 too): `x @ weight.T`."""
    return _primitive("MatMul", transpose_b=True)(x, weight)


def gather(table: Tensor, rows: Tensor) -> Tensor:
    """`table[rows]`; every row must exist."""
    return _primitive("Gather")(table, rows, 0)


def batch_matmul(x: Tensor, y: Tensor, transposed: bool) -> Tensor:
    """`[n, rows, in]` and `[n, in, out]`, or `[n, out, in]` if `transposed`, of one dtype (float32 too)."""
    return _primitive("BatchMatMul", False, transposed)(x, y)


def index_put(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """`target[rows] = values`, of int8 too; no row twice."""
    _INDEX_PUT(target, (rows,), values, False)


def tanh(x: Tensor) -> Tensor:
    """Of float32."""
    return _primitive("Tanh")(x)


def swiglu(x: Tensor) -> Tensor:
    """`[tokens, 2 n]` -> `[tokens, n]`: silu of the first half times the second."""
    return _primitive("Swiglu")(x, -1)


def silu(x: Tensor) -> Tensor:
    return _primitive("SiLU")(x)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """`approximate` is "none" (with erf) or "tanh"."""
    return _primitive("GeluExt")(x, approximate)


def relu(x: Tensor) -> Tensor:
    return _primitive("ReLU")(x)


def sigmoid(x: Tensor) -> Tensor:
    return _primitive("Sigmoid")(x)


# --- norms -----------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * gamma` over the last axis; `gamma` has the dtype of `x`."""
    return _primitive("RmsNorm", eps)(x, gamma)[0]


def add_rms_norm(x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` and the sum."""
    normed, _, total = _primitive("AddRmsNorm")(x, residual, gamma, eps)
    return normed, total


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Over the last axis; `gamma` and `beta` have the dtype of `x`."""
    return _primitive("LayerNormExt")(x, gamma.shape, gamma, beta, eps)[0]


# --- attention -------------------------------------------------------------------------------------------------


def apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """`x * cos + rotate_half(x) * sin` of each head of `query` and `key` `[tokens, heads * size]`.

    `cos` and `sin` are `[tokens, size]` in their dtype, gathered by position; `lengths` are each sequence's tokens.
    """
    turned = _primitive("ApplyRotaryPosEmb", 2)(query, key, cos, sin, lengths)
    return turned[0], turned[1]


def reshape_and_cache(
    key: Tensor, value: Tensor | None, key_cache: Tensor, value_cache: Tensor | None, slots: Tensor
) -> None:
    """Store `key` and `value` `[tokens, kv_heads * size]` in caches `[blocks, block_size, kv_heads, size]`, in place.

    Slots below 0 are skipped, as in practice; MindSpore does not document it. Without `value` only the key is stored.
    """
    _RESHAPE_AND_CACHE(key, value, key_cache, value_cache, slots)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    mask: Tensor | None,
    query_lens: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    mla_v_dim: int = 0,
) -> Tensor:
    """Attention of `query` `[tokens, heads * size]` over caches `[blocks, block_size, kv_heads, size]`.

    Without `mask` and `query_lens` every sequence has one token, its last. With them a sequence has as many rows as
    `query_lens` says, and `mask` `[tokens, positions]`, in the dtype of `query`, is added to the scores. `mla_v_dim`:
    a value is that many of the first features of its key, and so large is a head of the result.
    """
    attend = _primitive("PagedAttention", heads, scale, kv_heads, mla_v_dim=mla_v_dim)
    return attend(query, key_cache, value_cache, block_tables, context_lens, None, None, mask, query_lens)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_lens: Tensor,
    key_lens: Tensor,
    heads: int,
    scale: float,
) -> Tensor:
    """Attention within sequences that lie one behind the other in `query` and `key` (layout "TH").

    `mask` is `prepared.triangle` for causal attention; without one, nothing is masked (`sparse_mode` 0). The lengths
    are those of each sequence, not their sums.
    """
    attend = _primitive("FlashAttentionScore", heads, scale_value=scale, input_layout="TH")
    return attend(query, key, value, None, None, None, mask, None, query_lens, key_lens)[3]


# --- int8 ------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """`rint(x * scale + offset)` in int8; `scale` and `offset` are `[features]` in the dtype of `x`."""
    return _primitive("QuantV2")(x, scale, offset, False, "ROUND", ms.int8)


def quantize_by_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """`rint(x / s)` in int8 and s = max|x| / 127 of each row, float32 `[tokens]`."""
    rounded, scales = _primitive("DynamicQuantExt")(x, None)
    return rounded, scales


def quant_matmul(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, token_scales: Tensor | None, dtype: ms.Type
) -> Tensor:
    """`(x @ weight.T + bias) * scale * token_scales` in `dtype`, of int8 `[tokens, in]` and `[out, in]`.

    `bias` is int32 `[out]`. `scale` is `[out]`: float32; int64 with the bits of a float32 where `dtype` is float16 and
    there are no `token_scales` (float32 `[tokens]`).
    """
    multiply = _primitive("QuantBatchMatmul", transpose_x2=True, dtype=dtype)
    return multiply(x, weight, scale, None, bias, token_scales)


def weight_quant_matmul(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """`x @ ((weight + offset) * scale)`, of `[tokens, in]` and integers `[in, out]`, in the dtype of `x`.

    `weight` is int8, or qint4x2 `[in, out / 2]`: two of an even number of outputs in a byte, the first in the lower
    bits. `scale` and `offset`, in the dtype of `x`, are `[out]` with `group_size` 0; else `[groups, out]`, one for so
    many neighbouring inputs: a multiple of 32, and fewer than there are. At most 65535 inputs and outputs.
    """
    return _primitive("WeightQuantBatchMatmul", False, False, group_size)(x, weight, scale, offset)


# --- mixture of experts ----------------------------------------------------------------------------------------


def softmax_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row's softmax, largest first, and their columns, int32."""
    shares, ids, _ = _primitive("MoeGatingTopKSoftmax")(logits, None, k)
    return shares, ids


def sigmoid_group_top_k(
    logits: Tensor, bias: Tensor, groups: int, top_groups: int, of_group: int, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Of each row of float32 `logits` `[tokens, experts]`: shares, float32, and columns, int32, `[tokens, k]`.

    Ranks are `sigmoid(logits) + bias`; a group's is the sum of its `of_group` largest, and the `k` columns are of the
    best `top_groups` groups. Shares are the sigmoids over their sum, times `scale`. There are at most 32 experts in a
    group, and 8 groups if there are 32 experts or more.
    """
    choose = _primitive("FusedAddTopKDiv")
    shares, ids = choose(logits, bias, groups, top_groups, of_group, k, 0, True, scale, None, None, False)
    return shares, ids


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row, largest first, and their columns, int64."""
    values, ids = _primitive("TopkExt")(x, k, -1, True, True)
    return values, ids


def ascending(x: Tensor) -> Tensor:
    """An int32 vector, sorted."""
    return _primitive("SortExt")(x, -1, False, False)[0]


def fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """`x` with `value` where `mask`, which is broadcast, says so."""
    return _primitive("MaskedFill")(x, mask, Tensor(value, x.dtype))


def route(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of `x` `[tokens, features]` by their experts: each row once for each of its `ids` `[tokens, k]`, int32.

    Gives `[tokens * k, features]` in ascending order of experts, int32 `[tokens * k]` of where there the row of each of
    the ids is, and int32 `[experts]` of how many rows each expert has.
    """
    rows, places, counts, _ = _primitive("MoeInitRoutingV2")(x, ids, 0, 0, experts, 0, 2, False)
    return rows, places, counts


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """The first `counts[0]` rows of `x` `[rows, in]` times the first of `weight` `[experts, in, out]`, and so on.

    `counts` is int64 `[experts]`; rows beyond their sum are not computed, and may be anything. `bias` `[experts, out]`
    is float16 for float16, else float32. One tensor of all experts: MindSpore does not take one for each of them.
    """
    return _grouped(x, weight, counts, bias, None, None)


def grouped_quant_matmul(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    scale: Tensor,
    bias: Tensor,
    token_scales: Tensor | None,
    dtype: ms.Type,
) -> Tensor:
    """As `grouped_matmul` of int8, `(x @ weight + bias) * scale * token_scales` in `dtype`.

    `scale` and `bias`, int32, are `[experts, out]`, `token_scales` float32 `[rows]`. The operator takes the result's
    dtype from that of `scale`: float32 for float16, bfloat16 for bfloat16.
    """
    return _grouped(x, weight, counts, bias, scale, token_scales)


def grouped_weight_quant_matmul(
    x: Tensor, weight: Tensor, counts: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None
) -> Tensor:
    """As `grouped_matmul` with integers, `x @ ((weight + offset) * scale) + bias`: see `weight_quant_matmul`.

    `weight` is int8 or qint4x2; `scale` and `offset` are `[experts, out]` or, of 4 bits in groups of one even size and
    without `offset`, `[experts, groups, out]`.
    """
    return _grouped(x, weight, counts, bias, None, None, scale, offset)


def _grouped(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    token_scales: Tensor | None,
    weight_scale: Tensor | None = None,
    weight_offset: Tensor | None = None,
) -> Tensor:
    optional = bias, scale, weight_scale, weight_offset, token_scales
    biases, scales, weight_scales, weight_offsets, tokens = ([one] if one is not None else None for one in optional)
    multiply = _primitive("GroupedMatmulV4")
    arguments = [x], [weight], biases, scales, None, weight_scales, weight_offsets, tokens, counts, None, None, None
    # split_item 3, group_type 0, group_list_type 1: one result, by ranges of rows, which are given by their lengths
    return multiply(*arguments, 3, 0, 1, 0, None)[0]


def unpermute(x: Tensor, places: Tensor, shares: Tensor) -> Tensor:
    """`sum_k shares[t, k] * x[places[t * K + k]]` in the dtype of `x`; `shares` is float32 `[tokens, K]`.

    The opposite of `route`, by the operator that `ops.moe_token_unpermute` calls.
    """
    return _primitive("InnerMoeTokenUnpermute")(x, places, shares, False, None)


# --- sampling --------------------------------------------------------------------------------------------------


def argmax(x: Tensor) -> Tensor:
    """int64 `[rows]` of float32 `[rows, n]`: where the largest of each row is, the first of equal ones."""
    return _primitive("ArgMaxExt")(x, -1, False)


def sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of float32 `[rows, n]` in descending order, equal ones as they come; and int64 where each was."""
    values, places = _primitive("SortExt")(x, -1, True, True)
    return values, places


def softmax(x: Tensor) -> Tensor:
    """Of each row of float32 `[rows, n]`."""
    return _primitive("Softmax", -1)(x)


def cumsum(x: Tensor) -> Tensor:
    """Along each row of float32 `[rows, n]`, itself included."""
    return _primitive("CumsumExt")(x, -1, None)
