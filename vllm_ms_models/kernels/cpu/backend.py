"""`CpuKernels`: the kernel interface on the compiled module.

The methods pass tensors on as they are: the compiled module checks dtypes and shapes (calls.h), in a fifth of the time
that it takes here. Results are fresh tensors whose memory comes from a recycling allocator (memory.cpp) and returns
there when no tensor, view or DLPack export of it is left.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore._c_expression import TensorPy  # the base class of Tensor, all in C

from vllm_ms_models.kernels import float8, integer_checks
from vllm_ms_models.kernels.cpu.loader import load
from vllm_ms_models.kernels.interface import SCALE_BYTES, Integers, Kernels, Weight
from vllm_ms_models.kernels.low_rank import Addend, LowRank, reduced_width
from vllm_ms_models.kernels.paged_sequences import PagedSequences
from vllm_ms_models.kernels.routing import Routing

_NAMES = {
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "portable": "portable",
}
_DTYPES = (ms.float32, ms.bfloat16, ms.float16, ms.int32, ms.int64, ms.int8)  # in the order of DType in kernels.h
_FLOAT32, _BFLOAT16, _FLOAT16, _INT32, _INT64, _INT8 = range(6)
_INPUTS = {"float": 0, "dynamic": 1, "static": 2}  # Input in kernels.h
_FLOAT8_VALUES = 1 << 18  # widened at a time: 1 MB of floats
_GROUP = 16  # positions of a panel of keys
_SILU, _GELU_ERF, _GELU_TANH = range(3)
_COMMON = {"silu": _SILU, "gelu": _GELU_ERF, "gelu_tanh": _GELU_TANH}
_GATES = _COMMON | {"clamped_swiglu": 3}  # Gate in kernels.h
_ACTIVATIONS = _COMMON | {"quick_gelu": 3, "relu": 4}  # Activation in kernels.h


@dataclass(frozen=True)
class PackedWeight(Weight):
    """A `Weight` in panels of 16 rows (gemm.cpp); `handle` is the address of its C++ description."""

    handle: int = 0
    keeper: Any = field(default=None, repr=False, compare=False)


def _code(dtype: Any) -> int:
    """Code of a dtype, or -1."""
    return next((code for code, known in enumerate(_DTYPES) if known == dtype), -1)


def _gate(activation: str) -> int:
    """Code of a gated activation."""
    if activation not in _GATES:
        raise ValueError(f"Activation {activation!r} is unknown; {', '.join(_GATES)} are supported.")
    return _GATES[activation]


class CpuKernels(Kernels):
    """Kernels for one process on a CPU.

    Args:
        isa: `avx512_bf16`, `avx512_vnni`, `avx512`, `avx2` or `portable`; default: $VLLM_MS_ISA, or the best that this
            machine runs.

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

    def describe(self) -> str:
        threads = self._module.threads()
        return f"C++ ({_NAMES[self.isa]}, {threads} thread{'s' if threads != 1 else ''})"

    @property
    def collectives(self) -> Any:
        """The compiled functions of ranks that share memory (calls_collectives.h)."""
        return self._kernels

    # --- weights -----------------------------------------------------------------------------------------------

    def new_weight(self, sizes: Sequence[int], in_features: int, dtype: ms.Type) -> PackedWeight:
        code = _code(dtype)
        if code not in (_FLOAT32, _BFLOAT16, _FLOAT16):
            raise ValueError(f"A weight cannot have dtype {dtype}; float32, bfloat16 and float16 are supported.")
        parts = tuple(int(size) for size in sizes)
        if in_features < 0 or any(size < 0 for size in parts):
            raise ValueError(f"A weight cannot have the sizes {parts} and {in_features} inputs.")
        data, handle, keeper = self._module.new_weight(code, int(in_features), parts)
        return PackedWeight(data, parts, int(in_features), dtype, handle=handle, keeper=keeper)

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
        self._kernels.load_rows(weight, part, first_row, source.ctypes.data, code, len(source), stride)

    def new_integer_weight(self, sizes: Sequence[int], in_features: int, integers: Integers) -> PackedWeight:
        parts = tuple(int(size) for size in sizes)
        integer_checks.check_sizes(parts, in_features)
        bits, size, groups = integers.bits, integers.group_size, integers.groups(in_features)
        data, handle, keeper = self._module.new_integer_weight(
            int(in_features), parts, bits, size, groups, _INPUTS[integers.activations]
        )
        return PackedWeight(data, parts, int(in_features), ms.int8, integers, handle, keeper)

    def load_integers(self, weight: Weight, part: int, first_row: int, values: np.ndarray) -> None:
        integer_checks.check_values(weight, part, first_row, values)
        if values.shape[1] > 1 and values.strides[1] != 1:
            values = np.ascontiguousarray(values)
        self._module.load_integers(weight, part, first_row, values.ctypes.data, len(values), values.strides[0])

    def load_float8(
        self, weight: Weight, part: int, first_row: int, values: np.ndarray, scales: np.ndarray, width: int, offset: int
    ) -> None:
        float8.check(weight, values, scales, width, offset)
        rows, columns = values.shape
        step = max(_FLOAT8_VALUES // max(columns, 1) // 16, 1) * 16  # a panel has 16 rows
        for first in range(0, rows, step):
            part_of = slice(first, min(first + step, rows))
            floats = self._widened(values[part_of], scales[part_of], width, offset)
            if weight.integers is None:
                self.load_rows(weight, part, first_row + first, floats)
                continue
            integers, factors = np.empty(floats.shape, np.int8), np.empty((len(floats), 1), np.float32)
            self._module.round_rows(floats.ctypes.data, *floats.shape, integers.ctypes.data, factors.ctypes.data)
            self.load_integers(weight, part, first_row + first, integers)
            self.load_scales(weight, part, first_row + first, factors)

    def _widened(self, values: np.ndarray, scales: np.ndarray, width: int, offset: int) -> np.ndarray:
        """`float8.widened`."""
        if values.shape[1] > 1 and values.strides[1] != 1:
            values = np.ascontiguousarray(values)
        scales, floats = np.ascontiguousarray(scales), np.empty(values.shape, np.float32)
        addresses = (values.ctypes.data, scales.ctypes.data, floats.ctypes.data)
        self._module.widen_float8(*addresses, *values.shape, values.strides[0], scales.shape[1], width, offset)
        return floats

    def load_scales(
        self,
        weight: Weight,
        part: int,
        first_row: int,
        scales: np.ndarray,
        zeros: np.ndarray | None = None,
        addends: np.ndarray | None = None,
    ) -> None:
        integer_checks.check_scales(weight, part, first_row, scales, zeros, addends)
        arrays = [None if array is None else np.ascontiguousarray(array) for array in (scales, zeros, addends)]
        addresses = [0 if array is None else array.ctypes.data for array in arrays]
        self._module.load_scales(weight, part, first_row, *addresses, len(scales))

    def set_input(self, weight: Weight, part: int, scale: float, offset: int) -> None:
        integer_checks.check_input(weight, part, scale, offset)
        self._module.set_input(weight, part, float(scale), int(offset))

    # --- dense -------------------------------------------------------------------------------------------------

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        dtype: ms.Type | None = None,
        addend: Addend | None = None,
    ) -> Tensor:
        return self._kernels.linear(x, weight, bias, dtype, addend)

    def linear_split(
        self, x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Addend | None = None
    ) -> tuple[Tensor, ...]:
        return self._kernels.linear_split(x, weight, bias, addend)

    def linear_gated(
        self, x: Tensor, weight: Weight, activation: str, bias: Tensor | None = None, addend: Addend | None = None
    ) -> Tensor:
        return self._kernels.linear_gated(x, weight, bias, _gate(activation), addend)

    def reduce(self, x: Tensor, rows: Tensor, adapters: Sequence[LowRank | None]) -> Addend:
        adapters = tuple(adapters)
        return Addend(rows, adapters, self._kernels.reduce(x, rows, adapters, reduced_width(adapters)))

    def linear_heads(self, x: Tensor, weights: Sequence[Weight], passed: int = 0) -> Tensor:
        return self._kernels.linear_heads(x, tuple(weights), passed)

    def embedding(self, ids: Tensor, weight: Weight, first_row: int = 0) -> Tensor:
        return self._kernels.embedding(ids, weight, first_row)

    # --- mixture of experts ------------------------------------------------------------------------------------

    def choose_experts(self, logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        routing.check(logits.shape[-1])
        return self._module.choose_experts(
            logits,
            bias,
            routing.top_k,
            routing.groups,
            routing.top_groups,
            routing.scoring == "sigmoid",
            routing.group_rank == "top2",
            routing.renormalize,
            routing.scale,
        )

    def experts(
        self,
        x: Tensor,
        gate_up: Sequence[Weight],
        down: Sequence[Weight],
        ids: Tensor,
        shares: Tensor,
        activation: str,
        addend: Tensor | None = None,
        first_expert: int = 0,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Tensor:
        gate = _gate(activation)
        return self._kernels.experts(x, gate_up, down, ids, shares, gate, addend, first_expert, gate_up_bias, down_bias)

    # --- elementwise -------------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._kernels.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._kernels.add_rms_norm(x, residual, weight, eps), residual

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return self._kernels.layer_norm(x, weight, bias, eps)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self._kernels.add_layer_norm(x, residual, weight, bias, eps), residual

    def activate(self, x: Tensor, activation: str) -> Tensor:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"Activation {activation!r} is unknown; {', '.join(_ACTIVATIONS)} are supported.")
        return self._kernels.activate(x, _ACTIVATIONS[activation])

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._kernels.gate_and_mul(gate, up, _SILU)

    def gelu_and_mul(self, gate: Tensor, up: Tensor, approximate: bool) -> Tensor:
        return self._kernels.gate_and_mul(gate, up, _GELU_TANH if approximate else _GELU_ERF)

    # --- attention ---------------------------------------------------------------------------------------------

    def rotary(
        self,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        head_size: int,
        interleaved: bool,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        self._kernels.rotary(query, key, positions, cos_sin, head_size, interleaved, offset)
        return query, key

    def cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, storage: ms.Type | None = None
    ) -> tuple[int, int, int, int, int]:
        """Axis 1 is key or value; how the last two are arranged within is told in kv_cache.cpp."""
        if block_size % _GROUP:
            raise ValueError(f"Cache blocks of {block_size} positions are not supported; a multiple of {_GROUP} is.")
        return num_blocks, 2, num_kv_heads, block_size, head_size + (SCALE_BYTES if storage == ms.int8 else 0)

    def write_kv(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        self._kernels.write_kv(key, value, cache, slots)

    def paged_attention(
        self,
        query: Tensor,
        cache: Tensor,
        sequences: PagedSequences,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        causal: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:
        return self._kernels.attention(
            query,
            cache,
            sequences.query_start,
            sequences.seq_lens,
            sequences.block_tables,
            scale,
            soft_cap or 0.0,
            window or 0,
            causal,
            sinks,
        )

    def latent_cache_shape(self, num_blocks: int, block_size: int, width: int) -> tuple[int, int, int]:
        """Rows as they are; attention copies a tile at a time into the order in which it multiplies."""
        if block_size % _GROUP:
            raise ValueError(f"Cache blocks of {block_size} positions are not supported; a multiple of {_GROUP} is.")
        return num_blocks, block_size, width

    def write_latent(self, latent: Tensor, key: Tensor, cache: Tensor, slots: Tensor) -> None:
        self._kernels.write_latent(latent, key, cache, slots)

    def mla_attention(
        self, query: Tensor, cache: Tensor, sequences: PagedSequences, scale: float, value_size: int
    ) -> Tensor:
        starts, lengths, tables = sequences.query_start, sequences.seq_lens, sequences.block_tables
        return self._kernels.mla_attention(query, cache, starts, lengths, tables, scale, value_size)

    def mla_prefill(
        self,
        query: Tensor,
        cache: Tensor,
        sequences: PagedSequences,
        keys: Sequence[Weight],
        values: Sequence[Weight],
        scale: float,
    ) -> Tensor:
        starts, lengths, tables = sequences.query_start, sequences.seq_lens, sequences.block_tables
        return self._kernels.mla_prefill(query, cache, starts, lengths, tables, tuple(keys), tuple(values), scale)


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
        module.connect(TensorPy, _DTYPES, np.ndarray)
        module.set_thread_limit(_thread_limit())
        _module = module
    return _module
