"""The reference back end: what each kernel means, in plain MindSpore operators, and what serves without a compiler.

All arithmetic is MindSpore's, in float32: operands are widened on the way in, results rounded once on the way out.
What only moves or converts values (a part of a weight, rows of an embedding, pages of a cache) goes through the memory
of the tensors (`_memory`): on CPU no operator writes into a part of a tensor in every activation dtype, and reading
bfloat16 as other bits copies the whole tensor. Hence CPU only, with blocking launches
(`mindspore.runtime.launch_blocking`).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from vllm_ms_models.kernels import (
    float8,
    reference_cache,
    reference_elementwise,
    reference_experts,
    reference_integers,
    reference_latent,
    reference_low_rank,
    reference_weights,
)
from vllm_ms_models.kernels.interface import SCALE_BYTES, Integers, Kernels, Weight
from vllm_ms_models.kernels.low_rank import Addend, LowRank
from vllm_ms_models.kernels.paged_sequences import PagedSequences
from vllm_ms_models.kernels.reference_elementwise import sigmoid
from vllm_ms_models.kernels.reference_memory import cast as _cast
from vllm_ms_models.kernels.reference_memory import copy as _copy
from vllm_ms_models.kernels.reference_memory import memory as _memory
from vllm_ms_models.kernels.routing import Routing

_SCORE_CHUNK = 1 << 24  # attention scores at a time: 64 MB
_MASKED = -3.0e38  # a score no other can be below; its exponential is 0 even after the maximum was subtracted


def _float32(x: Tensor) -> Tensor:
    return _cast(x, ms.float32)


def _overwrite(target: Tensor, value: Tensor) -> None:
    """Replace the values of `target` in its own memory."""
    _copy(_memory(target), _memory(value.contiguous()))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class ReferenceKernels(Kernels):
    """Kernels in plain MindSpore operators; see `Kernels` for what each method does."""

    name: ClassVar[str] = "reference"

    def __init__(self) -> None:
        # As operators, not functions: they take a transposed operand without copying it.
        self._matmul_bt = ops.MatMul(transpose_b=True)
        self._batch_matmul = ops.BatchMatMul()
        self._batch_matmul_bt = ops.BatchMatMul(transpose_b=True)

    def describe(self) -> str:
        return "reference (plain MindSpore operators)"

    # --- weights -----------------------------------------------------------------------------------------------

    def new_weight(self, sizes: Sequence[int], in_features: int, dtype: ms.Type) -> Weight:
        return reference_weights.new_weight(sizes, in_features, dtype)

    def load_rows(self, weight: Weight, part: int, first_row: int, source: np.ndarray) -> None:
        reference_weights.load_rows(weight, part, first_row, source)

    def new_integer_weight(self, sizes: Sequence[int], in_features: int, integers: Integers) -> Weight:
        return reference_integers.new_weight(sizes, in_features, integers)

    def load_integers(self, weight: Weight, part: int, first_row: int, values: np.ndarray) -> None:
        reference_integers.load_values(weight, part, first_row, values)

    def load_float8(
        self, weight: Weight, part: int, first_row: int, values: np.ndarray, scales: np.ndarray, width: int, offset: int
    ) -> None:
        float8.load(self, weight, part, first_row, values, scales, width, offset)

    def load_scales(
        self,
        weight: Weight,
        part: int,
        first_row: int,
        scales: np.ndarray,
        zeros: np.ndarray | None = None,
        addends: np.ndarray | None = None,
    ) -> None:
        reference_integers.load_scales(weight, part, first_row, scales, zeros, addends)

    def set_input(self, weight: Weight, part: int, scale: float, offset: int) -> None:
        reference_integers.set_input(weight, part, scale, offset)

    # --- dense -------------------------------------------------------------------------------------------------

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        dtype: ms.Type | None = None,
        addend: Addend | None = None,
    ) -> Tensor:
        return _cast(self._product(x, weight, bias, addend), x.dtype if dtype is None else dtype)

    def linear_split(
        self, x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Addend | None = None
    ) -> tuple[Tensor, ...]:
        product = _memory(self._product(x, weight, bias, addend))
        parts = tuple(mint.empty((x.shape[0], size), dtype=x.dtype) for size in weight.sizes)
        for part, columns in zip(parts, np.split(product, np.cumsum(weight.sizes)[:-1], 1), strict=True):
            _copy(_memory(part), columns)
        return parts

    def linear_gated(
        self, x: Tensor, weight: Weight, activation: str, bias: Tensor | None = None, addend: Addend | None = None
    ) -> Tensor:
        _require(len(set(weight.sizes)) == 1 and len(weight.sizes) == 2, f"gate and up have the sizes {weight.sizes}")
        known = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")
        _require(activation in known, f"there is no gated activation {activation!r}")
        gate, up = (part.contiguous() for part in ops.split(self._product(x, weight, bias, addend), weight.sizes[0], 1))
        return _cast(reference_elementwise.gate_and_mul(gate, up, activation), x.dtype)

    def reduce(self, x: Tensor, rows: Tensor, adapters: Sequence[LowRank | None]) -> Addend:
        return reference_low_rank.reduce(x, rows, adapters, self._product)

    def _product(self, x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Addend | None = None) -> Tensor:
        """`x @ weight.T + bias`, and what adapters add, in float32."""
        features = weight.in_features
        _require(x.ndim == 2 and x.shape[1] == features, f"expected [tokens, {features}], got {x.shape}")
        if x.shape[0] == 0:
            return mint.empty((0, weight.out_features), dtype=ms.float32)
        x = _float32(x)
        if weight.integers is not None:
            products = list(reference_integers.products(x, weight))
        else:
            products = [self._matmul_bt(x, rows) for rows in reference_weights.float32_rows(weight)]
        result = products[0] if len(products) == 1 else ops.concat(products, 1)
        result = result if bias is None else result + bias
        return result if addend is None else reference_low_rank.add(result, addend, self._product)

    def linear_heads(self, x: Tensor, weights: Sequence[Weight], passed: int = 0) -> Tensor:
        return reference_latent.linear_heads(x, weights, passed, self._product)

    def embedding(self, ids: Tensor, weight: Weight, first_row: int = 0) -> Tensor:
        result = mint.empty((ids.shape[0], weight.in_features), dtype=weight.dtype)
        if ids.shape[0] > 0:
            rows = ids.asnumpy() - first_row
            known = (rows >= 0) & (rows < weight.out_features)
            memory = _memory(result)
            memory[~known] = 0
            memory[known] = _memory(weight.data)[rows[known]]
        return result

    # --- mixture of experts ------------------------------------------------------------------------------------

    def choose_experts(self, logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return reference_experts.choose(logits, routing, bias)

    def experts(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return _cast(reference_experts.multiply(self, x, *arguments, **options), x.dtype)

    # --- elementwise -------------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return reference_elementwise.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        _require(x.shape == residual.shape, f"x is {x.shape}, the residual {residual.shape}")
        if 0 not in x.shape:
            _overwrite(residual, _float32(residual) + _float32(x))
        return self.rms_norm(residual, weight, eps), residual

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return reference_elementwise.layer_norm(x, weight, bias, eps)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        _require(x.shape == residual.shape, f"x is {x.shape}, the residual {residual.shape}")
        if 0 not in x.shape:
            _overwrite(residual, _float32(residual) + _float32(x))
        return self.layer_norm(residual, weight, bias, eps), residual

    def activate(self, x: Tensor, activation: str) -> Tensor:
        return reference_elementwise.activate(x, activation)

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return reference_elementwise.gate_and_mul(gate, up, "silu")

    def gelu_and_mul(self, gate: Tensor, up: Tensor, approximate: bool) -> Tensor:
        return reference_elementwise.gate_and_mul(gate, up, "gelu_tanh" if approximate else "gelu")

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
        half = cos_sin.shape[1] // 2
        fits = 0 <= offset <= head_size - 2 * half
        _require(fits, f"{2 * half} features from feature {offset} on cannot rotate in a head of {head_size}")
        if positions.shape[0] == 0:
            return query, key
        rows = ops.gather(cos_sin, positions, 0).reshape(-1, 1, 2 * half)
        cos, sin = rows[..., :half], rows[..., half:]
        _overwrite(query, self._rotated(query, cos, sin, head_size, interleaved, offset))
        _overwrite(key, self._rotated(key, cos, sin, head_size - offset, interleaved, 0))
        return query, key

    @staticmethod
    def _rotated(x: Tensor, cos: Tensor, sin: Tensor, head_size: int, interleaved: bool, offset: int) -> Tensor:
        """`x` in float32 with pairs turned by the angles of `cos` and `sin`, both `[tokens, 1, pairs]`."""
        tokens, features = x.shape
        half = cos.shape[-1]
        whole = _float32(x).reshape(tokens, features // head_size, head_size)
        heads = whole[..., offset:]
        if interleaved:
            first, second = heads[..., 0 : 2 * half : 2], heads[..., 1 : 2 * half : 2]
        else:
            first, second = heads[..., :half], heads[..., half : 2 * half]
        turned = (first * cos - second * sin, second * cos + first * sin)
        if interleaved:
            parts = [ops.stack(turned, -1).reshape(tokens, -1, 2 * half)]
        else:
            parts = list(turned)
        if offset:
            parts.insert(0, whole[..., :offset])
        if offset + 2 * half < head_size:
            parts.append(heads[..., 2 * half :])
        return ops.concat(parts, -1).reshape(tokens, features)

    def cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, storage: ms.Type | None = None
    ) -> tuple[int, int, int, int, int]:
        """Axis 1 is key or value; a row of int8 ends with its scale."""
        return num_blocks, 2, num_kv_heads, block_size, head_size + (SCALE_BYTES if storage == ms.int8 else 0)

    def write_kv(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        blocks, _, heads, block_size, _ = cache.shape
        head_size = reference_cache.head_size_of(cache)
        fits = cache.dtype == ms.int8 or cache.dtype == key.dtype
        _require(fits, f"the keys are {key.dtype}, the cache is {cache.dtype}")
        _require(slots.shape[0] == key.shape[0], f"{slots.shape[0]} slots for {key.shape[0]} tokens")
        if slots.shape[0] == 0:
            return
        all_slots = slots.asnumpy()
        tokens = np.flatnonzero(all_slots >= 0)
        block, offset = np.divmod(all_slots[tokens], block_size)
        _require(bool((block < blocks).all()), f"a slot lies beyond the last of {blocks} blocks of {block_size}")
        memory = _memory(cache, or_int8=True)
        for index, x in enumerate((key, value)):
            if cache.dtype == ms.int8:
                rows = reference_cache.rounded_rows(_float32(x), heads)
            else:
                rows = _memory(x.contiguous()).reshape(-1, heads, head_size)
            memory[block, index, :, offset] = rows[tokens]

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
        tokens, features = query.shape
        head_size = reference_cache.head_size_of(cache)
        if sinks is not None:
            _require(sinks.shape == (features // head_size,), f"{features // head_size} heads have sinks {sinks.shape}")
        result = mint.empty((tokens, features), dtype=query.dtype)
        if tokens == 0:
            return result
        memory = _memory(result)
        memory[...] = 0
        heads = _float32(query).reshape(tokens, features // head_size, head_size)
        starts, lengths = sequences.query_start.asnumpy(), sequences.seq_lens.asnumpy()
        tables = sequences.block_tables.asnumpy()
        for table, row, end, length in zip(tables, starts[:-1], starts[1:], lengths, strict=True):
            shift = int(length) - int(end)  # from a row to its position
            step = max(1, _SCORE_CHUNK // (heads.shape[1] * max(1, int(length))))
            for first in range(int(row), int(end), step):
                last = min(first + step, int(end))
                positions = np.arange(first, last) + shift
                lowest = 0 if window is None else max(0, int(positions[0]) - window + 1)
                stop = int(positions[-1]) + 1 if causal else int(length)
                pages = self._gather(cache, table, lowest, stop)
                mask = _mask(positions, np.arange(lowest, stop), window, causal)
                rows = self._attend(heads[first:last], *pages, mask, scale, soft_cap, sinks)
                _copy(memory[first:last], _memory(rows.contiguous()))
        return result

    def latent_cache_shape(self, num_blocks: int, block_size: int, width: int) -> tuple[int, int, int]:
        return num_blocks, block_size, width

    def write_latent(self, latent: Tensor, key: Tensor, cache: Tensor, slots: Tensor) -> None:
        reference_latent.write(latent, key, cache, slots)

    def mla_attention(
        self, query: Tensor, cache: Tensor, sequences: PagedSequences, scale: float, value_size: int
    ) -> Tensor:
        return reference_latent.attention(query, cache, sequences, scale, value_size)

    def mla_prefill(
        self,
        query: Tensor,
        cache: Tensor,
        sequences: PagedSequences,
        keys: Sequence[Weight],
        values: Sequence[Weight],
        scale: float,
    ) -> Tensor:
        return reference_latent.prefill(query, cache, sequences, keys, values, scale, self._product)

    @staticmethod
    def _gather(
        cache: Tensor, table: np.ndarray, start: int, stop: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Keys and values of positions `start` to `stop` in float32, `[kv_heads, positions, head_size]` each.

        Those of int8 without their scales, which are `[kv_heads, 1, positions]` each.
        """
        _, _, heads, block_size, head_size = cache.shape
        first = start // block_size
        pages = _memory(cache, or_int8=True)[table[first : -(-stop // block_size)]]
        rows = pages.transpose(1, 2, 0, 3, 4).reshape(2, heads, -1, head_size)
        rows = rows[:, :, start - first * block_size : stop - first * block_size]
        if cache.dtype == ms.int8:
            (keys, values), scales = reference_cache.widened(rows)
            return Tensor(keys), Tensor(values), (Tensor(scales[0][:, None]), Tensor(scales[1][:, None]))
        keys, values = rows.astype(np.float32)
        return Tensor(keys), Tensor(values), None

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scales: tuple[Tensor, Tensor] | None,
        mask: Tensor,
        scale: float,
        soft_cap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of `query` `[rows, heads, head_size]` where `mask` `[rows, positions]` is true, in float32."""
        rows, heads, head_size = query.shape
        kv_heads, positions, _ = keys.shape
        grouped = ops.transpose(query, (1, 0, 2)).reshape(kv_heads, -1, head_size)
        scores = self._batch_matmul_bt(grouped, keys)
        scores = (scores if scales is None else scores * scales[0]) * scale
        if soft_cap is not None:
            # The Tanh operator is off by 1e-4 on CPU; this form by 2e-6.
            scores = (2.0 * sigmoid(scores * (2.0 / soft_cap)) - 1.0) * soft_cap
        scores = ops.where(mask, scores.reshape(heads, rows, positions), _MASKED)
        if sinks is not None:  # one more position, of which only the share is kept from the others
            scores = ops.concat([scores, ops.broadcast_to(sinks.reshape(heads, 1, 1), (heads, rows, 1))], -1)
        shares = ops.softmax(scores, -1)[..., :positions].reshape(kv_heads, -1, positions)
        if scales is not None:
            shares = ops.select(shares != 0, shares * scales[1], 0.0)
        result = self._batch_matmul(shares, values).reshape(heads, rows, head_size)
        return ops.transpose(result, (1, 0, 2)).reshape(rows, heads * head_size)


def _mask(positions: np.ndarray, keys: np.ndarray, window: int | None, causal: bool) -> Tensor:
    """Which of the positions `keys` each of `positions` attends to."""
    mask = np.ones((len(positions), len(keys)), np.bool_)
    if causal:
        mask &= keys <= positions[:, None]
    if window is not None:
        mask &= keys > positions[:, None] - window
    return Tensor(mask)
