"""`Kernels` on MindSpore's fused operators for Ascend. **Not run on hardware.**"""

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models.kernels import float8
from vllm_ms_models.kernels.ascend import dense, operators, weights
from vllm_ms_models.kernels.ascend import routing as routing_on_ascend
from vllm_ms_models.kernels.ascend.attention import Prepared, doubled_slots, half_blocks, triangle
from vllm_ms_models.kernels.ascend.experts import Experts
from vllm_ms_models.kernels.ascend.low_rank import LowRankProducts
from vllm_ms_models.kernels.interface import Kernels, PagedSequences
from vllm_ms_models.kernels.low_rank import Addend, LowRank
from vllm_ms_models.kernels.routing import Routing
from vllm_ms_models.kernels.weight import Integers, Weight


class AscendKernels(Kernels):
    """Kernels as calls of `operators`; see `Kernels` for what each method does, the package for what is missing.

    `operators` is the module of that name or, in tests, an object with its functions. Attention is FlashAttentionScore
    where no sequence has context and its keys were just written (`write_kv` keeps them until then), PagedAttention
    otherwise.
    """

    name: ClassVar[str] = "ascend"

    def __init__(self, fused: Any = operators) -> None:
        self._ops = fused
        self._low_rank = LowRankProducts(fused)
        self._dense = dense.Dense(fused, self._low_rank)
        self._experts = Experts(fused, self._dense)
        self._prepared: Prepared | None = None
        self._triangles: dict[ms.Type, Tensor] = {}
        self._written: tuple[Tensor, Tensor, Tensor] | None = None  # a cache and what was last written to it

    def describe(self) -> str:
        return "Ascend (fused operators; not run on hardware)"

    # --- weights -----------------------------------------------------------------------------------------------

    def new_weight(self, sizes: Sequence[int], in_features: int, dtype: ms.Type) -> Weight:
        return weights.new_weight(sizes, in_features, dtype)

    def load_rows(self, weight: Weight, part: int, first_row: int, source: np.ndarray) -> None:
        weights.load_rows(self._ops, weight, part, first_row, source)

    def new_integer_weight(self, sizes: Sequence[int], in_features: int, integers: Integers) -> Weight:
        return weights.new_integer_weight(sizes, in_features, integers)

    def load_integers(self, weight: Weight, part: int, first_row: int, values: np.ndarray) -> None:
        weights.load_integers(self._ops, weight, part, first_row, values)

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
        weights.load_scales(self._ops, weight, part, first_row, scales, zeros, addends)

    def set_input(self, weight: Weight, part: int, scale: float, offset: int) -> None:
        weights.set_input(weight, part, scale, offset)

    # --- dense -------------------------------------------------------------------------------------------------

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        dtype: ms.Type | None = None,
        addend: Addend | None = None,
    ) -> Tensor:
        return self._dense.linear(x, weight, bias, x.dtype if dtype is None else dtype, addend)

    def linear_split(
        self, x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Addend | None = None
    ) -> tuple[Tensor, ...]:
        return self._dense.split(self._dense.linear(x, weight, bias, x.dtype, addend), weight.sizes)

    def linear_gated(
        self, x: Tensor, weight: Weight, activation: str, bias: Tensor | None = None, addend: Addend | None = None
    ) -> Tensor:
        return self._dense.linear_gated(x, weight, activation, bias, addend)

    def reduce(self, x: Tensor, rows: Tensor, adapters: Sequence[LowRank | None]) -> Addend:
        return self._low_rank.reduce(x, rows, adapters)

    def linear_heads(self, x: Tensor, weights: Sequence[Weight], passed: int = 0) -> Tensor:
        return self._dense.linear_heads(x, [weight.data for weight in weights], passed)

    def embedding(self, ids: Tensor, weight: Weight, first_row: int = 0) -> Tensor:
        return self._dense.embedding(ids, weight, first_row)

    # --- mixture of experts ------------------------------------------------------------------------------------

    def choose_experts(self, logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return routing_on_ascend.choose(self._ops, logits, routing, bias)

    def experts(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return self._experts.multiply(self, x, *arguments, **options)

    # --- elementwise -------------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._dense.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._dense.add_rms_norm(x, residual, weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return self._dense.layer_norm(x, weight, bias, eps)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if 0 not in x.shape:
            self._ops.write_rows(residual, 0, residual + x)
        return self.layer_norm(residual, weight, bias, eps), residual

    def activate(self, x: Tensor, activation: str) -> Tensor:
        return self._dense.activate(x, activation)

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._dense.activate(gate, "silu") * up if 0 not in gate.shape else gate.copy()

    def gelu_and_mul(self, gate: Tensor, up: Tensor, approximate: bool) -> Tensor:
        activation = "gelu_tanh" if approximate else "gelu"
        return self._dense.activate(gate, activation) * up if 0 not in gate.shape else gate.copy()

    def rotary(
        self,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        head_size: int,
        interleaved: bool,
        offset: int = 0,
    ) -> None:
        self._dense.rotary(query, key, positions, cos_sin, head_size, interleaved, offset)

    # --- attention ---------------------------------------------------------------------------------------------

    def cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, storage: ms.Type | None = None
    ) -> tuple[int, int, int, int, int]:
        """A block's keys, then its values, position by position; see `attention` for the operators' views of it."""
        if storage == ms.int8:
            _missing("a KV cache of int8")
        if block_size % 16 or head_size % 16:
            raise ValueError(f"blocks of {block_size} and heads of {head_size} are not both multiples of 16")
        return num_blocks, 2, block_size, num_kv_heads, head_size

    def write_kv(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        dense.check(key)
        if key.dtype != cache.dtype:
            raise ValueError(f"the keys are {key.dtype}, the cache is {cache.dtype}")
        if key.shape[0] == 0:
            return
        key, value = key.contiguous(), value.contiguous()
        keys, values = half_blocks(cache)
        self._ops.reshape_and_cache(key, value, keys, values, doubled_slots(slots, cache.shape[2]))
        self._written = cache, key, value

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
        dense.check(query)
        asked = {"sliding windows": window, "soft caps": soft_cap, "sinks": sinks}
        for what, value in asked.items():
            if value is not None:
                _missing(what)
        if not causal:
            _missing("attention in both directions")
        written, self._written = self._written, None
        step = self._prepare(sequences)
        if step.rows == 0:
            return query.copy()
        heads = query.shape[1] // cache.shape[4]
        rows = query[: step.rows].contiguous()
        if step.fresh and written is not None and written[0] is cache and written[1].shape[0] >= step.rows:
            key, value = (x[: step.rows].contiguous() for x in written[1:])
            mask = self._triangle(query.dtype)
            result = self._ops.flash_attention(
                rows, key, value, mask, step.query_lens, step.seq_lens, heads, float(scale)
            )
        else:
            keys, values = half_blocks(cache)
            result = self._attend(rows, keys, values, step.doubled_tables, step, heads, cache.shape[3], scale)
        return _with_rows(result, query.shape[0])

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        step: Prepared,
        heads: int,
        kv_heads: int,
        scale: float,
        mla_v_dim: int = 0,
    ) -> Tensor:
        query_lens = None if step.decoding else step.query_lens
        mask = step.mask(query.dtype)
        return self._ops.paged_attention(
            query, keys, values, tables, step.seq_lens, mask, query_lens, heads, kv_heads, float(scale), mla_v_dim
        )

    def _prepare(self, sequences: PagedSequences) -> Prepared:
        """All layers of a step pass the same object, so what is made of it is made once."""
        if self._prepared is None or self._prepared.sequences is not sequences:
            self._prepared = Prepared.of(sequences)
        return self._prepared

    def _triangle(self, dtype: ms.Type) -> Tensor:
        if dtype not in self._triangles:
            self._triangles[dtype] = triangle(dtype)
        return self._triangles[dtype]

    # --- multi-head latent attention ---------------------------------------------------------------------------

    def latent_cache_shape(self, num_blocks: int, block_size: int, width: int) -> tuple[int, int, int]:
        if block_size % 16:
            raise ValueError(f"blocks of {block_size} are not multiples of 16")
        return num_blocks, block_size, width

    def write_latent(self, latent: Tensor, key: Tensor, cache: Tensor, slots: Tensor) -> None:
        dense.check(latent)
        if latent.shape[0] > 0:
            rows = mint.cat([latent, key], -1)
            self._ops.reshape_and_cache(rows, None, _one_head(cache), None, slots.astype(ms.int32))

    def mla_attention(
        self, query: Tensor, cache: Tensor, sequences: PagedSequences, scale: float, value_size: int
    ) -> Tensor:
        dense.check(query)
        heads = query.shape[1] // cache.shape[2]
        step = self._prepare(sequences)
        if step.rows == 0:
            return mint.zeros((query.shape[0], heads * value_size), dtype=query.dtype)
        rows = query[: step.rows].contiguous()
        one = _one_head(cache)
        result = self._attend(rows, one, one, step.block_tables, step, heads, 1, scale, value_size)
        return _with_rows(result, query.shape[0])

    def mla_prefill(
        self,
        query: Tensor,
        cache: Tensor,
        sequences: PagedSequences,
        keys: Sequence[Weight],
        values: Sequence[Weight],
        scale: float,
    ) -> Tensor:
        """By absorbing `keys` into the query: nothing is expanded here, which is right, but not the quickest."""
        rank = keys[0].in_features
        transposed = [mint.permute(weight.data, (1, 0)).contiguous() for weight in keys]
        absorbed = self._dense.linear_heads(query, transposed, cache.shape[2] - rank)
        means = self.mla_attention(absorbed, cache, sequences, scale, rank)
        return self.linear_heads(means, values)


def _one_head(cache: Tensor) -> Tensor:
    """A cache of latents as keys of one head."""
    return cache.view(*cache.shape[:2], 1, cache.shape[2])


def _with_rows(x: Tensor, rows: int) -> Tensor:
    """`x` with as many rows; those that belong to no sequence are 0."""
    missing = rows - x.shape[0]
    return mint.cat([x, mint.zeros((missing, x.shape[1]), dtype=x.dtype)]) if missing else x


def _missing(what: str) -> NoReturn:
    raise NotImplementedError(f"The Ascend kernels do not have {what} yet; serve this model with VLLM_MS_DEVICE=cpu.")
