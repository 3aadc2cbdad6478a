"""`CpuKernels`: the kernel interface on the compiled module.

Each method checks shapes and dtypes, which costs about a microsecond, and passes addresses. Results are fresh tensors
whose memory comes from a recycling allocator (memory.cpp) and returns there when no tensor, view or DLPack export of
it is left.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore._c_expression import TensorPy  # what mindspore.utils.dlpack.from_dlpack calls

from vllm_ms_models.kernels.cpu.loader import load
from vllm_ms_models.kernels.interface import Kernels, PagedSequences, Weight

_NAMES = {"avx512_bf16": "AVX-512 BF16", "avx512": "AVX-512", "avx2": "AVX2", "portable": "portable"}
_DTYPES = (ms.float32, ms.bfloat16, ms.float16, ms.int32, ms.int64)  # in the order of DType in kernels.h
_FLOAT32, _BFLOAT16, _FLOAT16, _INT32, _INT64 = range(5)
# MindSpore's dtypes are singletons; comparing them costs 1 us, an identity look-up 0.05 us.
_CODES: dict[int, int] = {id(dtype): code for code, dtype in enumerate(_DTYPES)}
_GROUP = 16  # positions of a panel of keys
_SILU, _GELU_ERF, _GELU_TANH = range(3)
_GATES = {"silu": _SILU, "gelu": _GELU_ERF, "gelu_tanh": _GELU_TANH}


@dataclass(frozen=True)
class PackedWeight(Weight):
    """A `Weight` in panels of 16 rows (gemm.cpp); `handle` is the address of its C++ description."""

    handle: int = 0
    keeper: Any = field(default=None, repr=False, compare=False)


def _code(dtype: Any) -> int:
    """Code of a dtype, or -1."""
    code = _CODES.get(id(dtype))
    return next((i for i, known in enumerate(_DTYPES) if known == dtype), -1) if code is None else code


def _float_code(tensor: Tensor, name: str) -> int:
    """Code of the dtype of a contiguous activation."""
    code = _code(tensor.dtype)
    if code not in (_FLOAT32, _BFLOAT16, _FLOAT16):
        raise ValueError(f"{name} has dtype {tensor.dtype}; float32, bfloat16 or float16 is expected.")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous.")
    return code


def _expect(tensor: Tensor, code: int, name: str, shape: tuple[int, ...] | None = None) -> int:
    """Address of a contiguous tensor of the given dtype and shape."""
    if _code(tensor.dtype) != code or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tensor.dtype}; a contiguous {_DTYPES[code]} tensor is expected.")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tensor.shape}; {shape} is expected.")
    return tensor.data_ptr()


class CpuKernels(Kernels):
    """Kernels for one process on a CPU.

    Args:
        isa: `avx512_bf16`, `avx512`, `avx2` or `portable`; default: $VLLM_MS_ISA, or the best this machine runs.

    Raises:
        KernelBuildError: the kernels cannot be built.
        ValueError: the instruction set is unknown or this machine does not run it.
    """

    name: ClassVar[str] = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        self._module = load_module()
        available = self._module.isas()
        wanted = isa or os.environ.get("VLLM_MS_ISA") or available[0]
        if wanted not in available:
            raise ValueError(f"VLLM_MS_ISA={wanted!r} is not available here; use one of {', '.join(available)}.")
        self.isa = wanted
        self._kernels = self._module.kernels(wanted)
        self._linear = self._kernels.linear
        self._linear_split = self._kernels.linear_split
        self._linear_gated = self._kernels.linear_gated

    def describe(self) -> str:
        threads = self._module.threads()
        return f"C++ ({_NAMES[self.isa]}, {threads} thread{'s' if threads != 1 else ''})"

    # --- weights -----------------------------------------------------------------------------------------------

    def new_weight(self, sizes: Sequence[int], in_features: int, dtype: ms.Type) -> PackedWeight:
        code = _code(dtype)
        if code not in (_FLOAT32, _BFLOAT16, _FLOAT16):
            raise ValueError(f"A weight cannot have dtype {dtype}; float32, bfloat16 and float16 are supported.")
        parts = tuple(int(size) for size in sizes)
        if in_features < 0 or any(size < 0 for size in parts):
            raise ValueError(f"A weight cannot have the sizes {parts} and {in_features} inputs.")
        data, handle, keeper = self._module.new_weight(code, int(in_features), parts)
        return PackedWeight(data, parts, int(in_features), dtype, handle, keeper)

    def load_rows(self, weight: Weight, part: int, first_row: int, source: np.ndarray) -> None:
        code = {"float32": _FLOAT32, "float16": _FLOAT16, "bfloat16": _BFLOAT16}.get(source.dtype.name)
        if code is None or not source.dtype.isnative:
            raise ValueError(
                f"Rows of dtype {source.dtype} cannot be loaded; float32, float16 or bfloat16 is expected."
            )
        if source.ndim != 2 or source.shape[1] != weight.in_features:
            raise ValueError(f"Rows of shape {source.shape} do not fit a weight of {weight.in_features} inputs.")
        if not 0 <= part < len(weight.sizes) or not 0 <= first_row <= weight.sizes[part] - len(source):
            raise ValueError(
                f"{len(source)} rows from row {first_row} do not fit part {part} of a weight of sizes {weight.sizes}."
            )
        if (source.shape[1] > 1 and source.strides[1] != source.itemsize) or source.strides[0] % source.itemsize:
            source = np.ascontiguousarray(source)
        stride = source.strides[0] // source.itemsize
        self._kernels.load_rows(_handle(weight), part, first_row, source.ctypes.data, code, len(source), stride)

    # --- dense -------------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, dtype: ms.Type | None = None) -> Tensor:
        code = _float_code(x, "x")
        rows, features = x.shape
        if features != weight.in_features:
            raise ValueError(f"x has {features} features; the weight has {weight.in_features} inputs.")
        offset = 0 if bias is None else _expect(bias, _FLOAT32, "bias", (weight.out_features,))
        result = code if dtype is None else _code(dtype)
        if not 0 <= result <= _FLOAT16:
            raise ValueError(f"A result cannot have dtype {dtype}; float32, bfloat16 and float16 are supported.")
        return self._linear(_handle(weight), x.data_ptr(), code, rows, offset, result)

    def linear_split(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        code = _float_code(x, "x")
        rows, features = x.shape
        if features != weight.in_features:
            raise ValueError(f"x has {features} features; the weight has {weight.in_features} inputs.")
        offset = 0 if bias is None else _expect(bias, _FLOAT32, "bias", (weight.out_features,))
        return self._linear_split(_handle(weight), x.data_ptr(), code, rows, offset, code)

    def linear_gated(self, x: Tensor, weight: Weight, activation: str, bias: Tensor | None = None) -> Tensor:
        code = _float_code(x, "x")
        rows, features = x.shape
        if features != weight.in_features:
            raise ValueError(f"x has {features} features; the weight has {weight.in_features} inputs.")
        if len(weight.sizes) != 2 or weight.sizes[0] != weight.sizes[1] or activation not in _GATES:
            raise ValueError(f"A weight with parts of {weight.sizes} cannot be gated by {activation!r}.")
        offset = 0 if bias is None else _expect(bias, _FLOAT32, "bias", (weight.out_features,))
        return self._linear_gated(_handle(weight), x.data_ptr(), code, rows, offset, code, _GATES[activation])

    def embedding(self, ids: Tensor, weight: Weight, first_row: int = 0) -> Tensor:
        wide = _code(ids.dtype) == _INT64
        address = _expect(ids, _INT64 if wide else _INT32, "ids")
        return self._kernels.embedding(_handle(weight), address, wide, ids.shape[0], first_row)

    # --- elementwise -------------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        code, shape = _float_code(x, "x"), x.shape
        scale = _expect(weight, _FLOAT32, "weight", shape[-1:])
        return self._kernels.rms_norm(x.data_ptr(), 0, shape, code, scale, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        code, shape = _float_code(x, "x"), x.shape
        total = _expect(residual, code, "residual", shape)
        scale = _expect(weight, _FLOAT32, "weight", shape[-1:])
        return self._kernels.rms_norm(x.data_ptr(), total, shape, code, scale, eps), residual

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._gate_and_mul(gate, up, _SILU)

    def gelu_and_mul(self, gate: Tensor, up: Tensor, approximate: bool) -> Tensor:
        return self._gate_and_mul(gate, up, _GELU_TANH if approximate else _GELU_ERF)

    def _gate_and_mul(self, gate: Tensor, up: Tensor, kind: int) -> Tensor:
        code, shape = _float_code(gate, "gate"), gate.shape
        return self._kernels.gate_and_mul(gate.data_ptr(), _expect(up, code, "up", shape), shape, code, kind)

    # --- attention ---------------------------------------------------------------------------------------------

    def rotary(
        self, query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor, head_size: int, interleaved: bool
    ) -> None:
        code = _float_code(query, "query")
        tokens, features = query.shape
        key_features = key.shape[1]
        limit, rotary_size = cos_sin.shape
        if features % head_size or key_features % head_size or rotary_size > head_size or rotary_size % 2:
            raise ValueError(
                f"Heads of size {head_size}, {rotary_size} of it rotating, do not fit a query of {features} "
                f"and a key of {key_features} features."
            )
        self._kernels.rotary(
            query.data_ptr(),
            _expect(key, code, "key", (tokens, key_features)),
            code,
            tokens,
            features // head_size,
            key_features // head_size,
            head_size,
            _expect(positions, _INT64, "positions", (tokens,)),
            _expect(cos_sin, _FLOAT32, "cos_sin"),
            limit,
            rotary_size,
            interleaved,
        )

    def cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
    ) -> tuple[int, int, int, int, int]:
        """Axis 1 is key or value; how the last two are arranged within is told in kv_cache.cpp."""
        if block_size % _GROUP:
            raise ValueError(f"Cache blocks of {block_size} positions are not supported; a multiple of {_GROUP} is.")
        return num_blocks, 2, num_kv_heads, block_size, head_size

    def write_kv(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        code, shape = _float_code(key, "key"), key.shape
        blocks, _, kv_heads, block_size, head_size = cache.shape
        if shape[1] != kv_heads * head_size:
            raise ValueError(f"key has {shape[1]} features; the cache has {kv_heads} heads of {head_size}.")
        self._kernels.write_kv(
            key.data_ptr(),
            _expect(value, code, "value", shape),
            _expect(cache, code, "cache"),
            code,
            shape[0],
            blocks,
            kv_heads,
            block_size,
            head_size,
            _expect(slots, _INT64, "slots", shape[:1]),
        )

    def paged_attention(
        self,
        query: Tensor,
        cache: Tensor,
        sequences: PagedSequences,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        causal: bool = True,
    ) -> Tensor:
        code, shape, cache_shape = _float_code(query, "query"), query.shape, cache.shape
        _, _, kv_heads, _, head_size = cache_shape
        if shape[1] % (kv_heads * head_size):
            raise ValueError(f"query has {shape[1]} features; the cache has {kv_heads} heads of {head_size}.")
        count = sequences.seq_lens.shape[0]
        tables = sequences.block_tables
        return self._kernels.attention(
            query.data_ptr(),
            shape,
            code,
            _expect(cache, code, "cache"),
            cache_shape,
            _expect(sequences.query_start, _INT32, "query_start", (count + 1,)),
            _expect(sequences.seq_lens, _INT32, "seq_lens"),
            _expect(tables, _INT32, "block_tables"),
            count,
            tables.shape[1],
            scale,
            soft_cap or 0.0,
            window or 0,
            causal,
        )


def _handle(weight: Weight) -> int:
    if not isinstance(weight, PackedWeight):
        raise ValueError(
            f"The weight is a {type(weight).__name__}; the C++ kernels multiply their own `new_weight` only."
        )
    return weight.handle


def _thread_limit() -> int:
    """OMP_NUM_THREADS as the user set it (the first level of a list such as `4,2`), or 0.

    `os.environ` is how the process was started; MindSpore changes the C environment behind it.
    """
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(text), 1024) if text.isdecimal() else 0


_module: Any = None


def load_module() -> Any:
    """The compiled module, ready to make MindSpore tensors; loaded once a process."""
    global _module
    if _module is None:
        module = load()
        module.set_importer(TensorPy.from_dlpack)
        module.set_thread_limit(_thread_limit())
        _module = module
    return _module
