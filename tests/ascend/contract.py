"""Calls the real fused operators on a CPU: MindSpore checks each call, up to the kernel that only Ascend has.

MindSpore infers dtypes strictly and shapes loosely (PagedAttention takes caches of any rank), so `DOCUMENTED` says
besides what shapes the operators' documentation asks for. A call that passes both gives zeros of the result's shape, so
that the calls which follow are made as well.
"""

import re
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from tests.ascend import contract_experts
from tests.ascend.arrays import array_of
from tests.ascend.checks import Shape, ask, described
from tests.ascend.checks import like as _like
from tests.ascend.checks import vector as _vector
from vllm_ms_models.kernels.ascend import operators

PRIMITIVES = {
    "matmul": "MatMul",
    "batch_matmul": "BatchMatMul",
    "gather": "Gather",
    "index_put": "InplaceIndexPut",
    "tanh": "Tanh",
    "swiglu": "Swiglu",
    "silu": "SiLU",
    "gelu": "GeluExt",
    "relu": "ReLU",
    "sigmoid": "Sigmoid",
    "rms_norm": "RmsNorm",
    "add_rms_norm": "AddRmsNorm",
    "layer_norm": "LayerNormExt",
    "apply_rotary_pos_emb": "ApplyRotaryPosEmb",
    "reshape_and_cache": "ReshapeAndCache",
    "paged_attention": "PagedAttention",
    "flash_attention": "FlashAttentionScore",
    "quantize": "QuantV2",
    "quantize_by_token": "DynamicQuantExt",
    "quant_matmul": "QuantBatchMatmul",
    "argmax": "ArgMaxExt",
    "sort": "SortExt",
    "softmax": "Softmax",
    "cumsum": "CumsumExt",
} | contract_experts.PRIMITIVES
# What MindSpore says when all that is missing is the kernel: for operators that no CPU has, for those that are made of
# others, and for those that it has in other dtypes (bfloat16 is the dtype of few). SiLU is a Sigmoid inside.
NO_KERNEL = (
    r"^The kernel {0} unregistered\.",
    r"^Create kernelmod for op {0} failed",
    r"^Select CPU operator\[({0}|Sigmoid)\] fail! Unsupported data type!",
    r"Kernel select failed:[^A-Za-z]*(Select CPU operator|Unsupported op )\[{0}\]",
)


class Contract:
    """Has the functions of `operators`; `seen` are the calls checked, by function, dtypes and shapes."""

    def __init__(self) -> None:
        self.seen: set[tuple[Any, ...]] = set()
        self.calls = 0

    @staticmethod
    def to_device(x: Tensor) -> Tensor:
        return copied(x)

    @staticmethod
    def to_host(x: Tensor) -> Tensor:
        return copied(x)

    @staticmethod
    def write_rows(target: Tensor, first: int, rows: Tensor) -> None:
        """Not checked: it is no fused operator, and the one that a CPU has does not take a part of a tensor."""
        write_rows(target, first, rows)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._check(name, arguments)

    def _check(self, name: str, arguments: tuple[Any, ...]) -> Any:
        for tensor in arguments:
            if isinstance(tensor, Tensor):
                ask(tensor.is_contiguous() and 0 not in tensor.shape, f"{name}: empty or not contiguous")
        shapes = DOCUMENTED[name](*arguments)
        try:
            results = getattr(operators, name)(*arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            if not lacks_kernel(PRIMITIVES[name], error):
                raise
            zeros = [mint.zeros(shape, dtype=dtype) for shape, dtype in shapes]
            results = None if not zeros else zeros[0] if len(zeros) == 1 else tuple(zeros)
        else:
            found = results if isinstance(results, tuple) else (results,)
            ask([(tuple(x.shape), x.dtype) for x in found] == shapes, f"{name}: the result is not {shapes}")
        self.calls += 1
        self.seen.add((name, *(described(x) for x in arguments)))
        return results


def write_rows(target: Tensor, first: int, rows: Tensor) -> None:
    """`operators.write_rows` in the memory of the tensors."""
    source = array_of(rows)
    array_of(target)[first : first + len(source)] = source


def copied(x: Tensor) -> Tensor:
    """As a device of its own memory has it, and its host."""
    if x.dtype == ms.qint4x2:
        return Tensor(x.asnumpy().copy(), ms.qint4x2)
    return Tensor.from_numpy(array_of(x.contiguous()).copy()) if 0 not in x.shape else x.copy()


def lacks_kernel(primitive: str, error: Exception) -> bool:
    return any(re.search(pattern.format(primitive), str(error).strip()) for pattern in NO_KERNEL)


def _matmul(x: Tensor, weight: Tensor) -> list[Shape]:
    ask(x.ndim == weight.ndim == 2 and x.dtype == weight.dtype, "MatMul: two matrices of one dtype")
    return _like(x, weight.shape[0])


def _gather(table: Tensor, rows: Tensor) -> list[Shape]:
    _vector(rows, rows.shape[0], ms.int32, "rows")
    numbers = rows.asnumpy()
    ask(bool((0 <= numbers).all() and (numbers < table.shape[0]).all()), "Gather: rows that exist")
    return [((rows.shape[0], table.shape[1]), table.dtype)]


def _batch_matmul(x: Tensor, y: Tensor, transposed: bool) -> list[Shape]:
    ask(x.dtype == y.dtype and x.ndim == y.ndim == 3 and x.shape[0] == y.shape[0], "batches of one dtype")
    taken, given = (2, 1) if transposed else (1, 2)
    ask(x.shape[2] == y.shape[taken], "matrices that fit")
    return _like(x, y.shape[given])


def _index_put(target: Tensor, rows: Tensor, values: Tensor) -> list[Shape]:
    ask(target.ndim == values.ndim == 2 and target.shape[1] == values.shape[1], "rows as wide as the target's")
    ask(target.dtype == values.dtype, "index_put_: values of the target's dtype")
    _vector(rows, values.shape[0], ms.int32, "rows")
    numbers = rows.asnumpy()
    ask(len(set(numbers.tolist())) == len(numbers), "index_put_: no row twice")
    ask(bool((0 <= numbers).all() and (numbers < target.shape[0]).all()), "index_put_: rows that exist")
    return []


def _norm(x: Tensor, *parameters: Any) -> list[Shape]:
    for parameter in parameters[:-1]:
        _vector(parameter, x.shape[-1], x.dtype, "gamma or beta")
    ask(0 < parameters[-1] <= 1, "epsilon: from 0 to 1")
    return _like(x)


def _add_rms_norm(x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> list[Shape]:
    ask(residual.shape == x.shape and residual.dtype == x.dtype, "AddRmsNorm: two alike")
    return 2 * _norm(x, gamma, eps)


def _rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> list[Shape]:
    tokens, size = cos.shape
    for x in (query, key):
        ask(
            x.ndim == 2 and x.shape[0] == tokens and x.shape[1] % size == 0, f"{described(x)} is not of heads of {size}"
        )
        ask(x.dtype == cos.dtype == sin.dtype, "ApplyRotaryPosEmb: one dtype")
    ask(sin.shape == cos.shape and int(lengths.asnumpy().sum()) == tokens, "ApplyRotaryPosEmb: an angle for each token")
    return _like(query) + _like(key)


def _cache(cache: Tensor, width: int, dtype: Any) -> None:
    ask(cache.ndim == 4 and cache.dtype == dtype, f"a cache has four axes, not {described(cache)}")
    ask(cache.shape[2] * cache.shape[3] == width, f"{width} features for a cache of {described(cache)}")


def _reshape_and_cache(
    key: Tensor, value: Tensor | None, key_cache: Tensor, value_cache: Tensor | None, slots: Tensor
) -> list[Shape]:
    ask((value is None) == (value_cache is None), "a cache for each")
    for x, cache in ((key, key_cache), (value, value_cache)):
        if x is not None and cache is not None:
            _cache(cache, x.shape[1], x.dtype)
            ask(int(slots.asnumpy().max()) < cache.shape[0] * cache.shape[1], "slots within the cache")
    _vector(slots, key.shape[0], ms.int32, "slots")
    return []


def _paged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    query_lens: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    mla_v_dim: int,
) -> list[Shape]:
    tokens, sequences = query.shape[0], lengths.shape[0]
    ask(query.shape[1] % heads == heads % kv_heads == 0 and keys.shape[2] == kv_heads, "heads that fit")
    size = query.shape[1] // heads
    for cache in (keys, values):
        _cache(cache, kv_heads * size, query.dtype)
    _vector(lengths, sequences, ms.int32, "context_lens")
    longest = int(lengths.asnumpy().max())
    ask(tables.ndim == 2 and tables.shape[0] == sequences and tables.dtype == ms.int32, "a table for each sequence")
    ask(tables.shape[1] * keys.shape[1] >= longest, "tables as long as the sequences")
    ask((mask is None) == (query_lens is None), "a mask where a sequence has several rows")
    if mask is None or query_lens is None:
        ask(tokens == sequences, "a row for each sequence")
    else:
        _vector(query_lens, sequences, ms.int32, "q_seq_lens")
        ask(int(query_lens.asnumpy().sum()) == tokens, "q_seq_lens that sum to the rows")
        ask(tuple(mask.shape) == (tokens, longest) and mask.dtype == query.dtype, f"a mask like {described(mask)}")
    ask(mla_v_dim <= size and (not mla_v_dim or kv_heads == 1), "values within their keys")
    return _like(query, heads * (mla_v_dim or size))


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_lens: Tensor,
    key_lens: Tensor,
    heads: int,
    scale: float,
) -> list[Shape]:
    size = query.shape[1] // heads
    ask(size % 16 == 0 and size <= 512 and query.shape[1] == heads * size, "heads of multiples of 16, at most 512")
    ask(key.shape == value.shape and key.shape[1] % size == 0 and heads % (key.shape[1] // size) == 0, "heads that fit")
    ask(heads <= 256 and query_lens.shape[0] <= 2048, "at most 256 heads, and 2048 sequences")
    ask(key.shape[0] == query.shape[0] and query.dtype == key.dtype == value.dtype, "rows alike")
    if mask is not None:
        ask(tuple(mask.shape) == (128, 128) and mask.dtype == query.dtype, "the mask is of 128 by 128")
    for lengths in (query_lens, key_lens):
        _vector(lengths, query_lens.shape[0], ms.int32, "lengths")
        ask(int(lengths.asnumpy().sum()) == query.shape[0], "lengths that sum to the rows")
    return _like(query)


def _quantize(x: Tensor, scale: Tensor, offset: Tensor) -> list[Shape]:
    for parameter in (scale, offset):
        _vector(parameter, x.shape[-1], x.dtype, "scale or offset")
    return [(tuple(x.shape), ms.int8)]


def _quant_matmul(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, token_scales: Tensor | None, dtype: Any
) -> list[Shape]:
    ask(x.dtype == weight.dtype == ms.int8 and x.shape[1] == weight.shape[1], "integers that fit")
    bits = dtype == ms.float16 and token_scales is None
    _vector(scale, weight.shape[0], ms.int64 if bits else ms.float32, "scale")
    if bits:
        ask(bool((np.abs(scale.asnumpy()) < 1 << 32).all()), "the bits of a float32")
    if bias is not None:
        _vector(bias, weight.shape[0], ms.int32, "bias")
    if token_scales is not None:
        _vector(token_scales, x.shape[0], ms.float32, "scales of tokens")
    return [((x.shape[0], weight.shape[0]), dtype)]


def _of_rows(x: Tensor) -> list[Shape]:
    ask(x.ndim == 2 and x.dtype == ms.float32, "rows of float32")
    return _like(x)


def _of_float32(x: Tensor) -> list[Shape]:
    ask(x.dtype == ms.float32, "float32")
    return _like(x)


DOCUMENTED: dict[str, Callable[..., list[Shape]]] = {
    "matmul": _matmul,
    "batch_matmul": _batch_matmul,
    "gather": _gather,
    "index_put": _index_put,
    "tanh": _of_float32,
    "swiglu": lambda x: _like(x, x.shape[-1] // 2),
    "silu": _like,
    "gelu": lambda x, approximate: _like(x),
    "relu": _like,
    "sigmoid": _like,
    "rms_norm": _norm,
    "add_rms_norm": _add_rms_norm,
    "layer_norm": _norm,
    "apply_rotary_pos_emb": _rotary,
    "reshape_and_cache": _reshape_and_cache,
    "paged_attention": _paged,
    "flash_attention": _flash,
    "quantize": _quantize,
    "quantize_by_token": lambda x: [(tuple(x.shape), ms.int8), ((x.shape[0],), ms.float32)],
    "quant_matmul": _quant_matmul,
    "argmax": lambda x: [((_of_rows(x)[0][0][0],), ms.int64)],
    "sort": lambda x: [*_of_rows(x), (tuple(x.shape), ms.int64)],
    "softmax": _of_rows,
    "cumsum": _of_rows,
    **contract_experts.DOCUMENTED,
}
