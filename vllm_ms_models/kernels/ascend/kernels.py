"""`Kernels` on MindSpore's fused operators for Ascend. **Not run on hardware.**"""

from collections.abc import Sequence
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models.kernels import float8
from vllm_ms_models.kernels.ascend import caches, dense, integers, operators, weights
from vllm_ms_models.kernels.ascend import routing as routing_on_ascend
from vllm_ms_models.kernels.ascend.attention import Attention
from vllm_ms_models.kernels.ascend.experts import Experts
from vllm_ms_models.kernels.ascend.latent_attention import LatentAttention
from vllm_ms_models.kernels.ascend.low_rank import LowRankProducts
from vllm_ms_models.kernels.ascend.sampling import DeviceSampling
from vllm_ms_models.kernels.interface import Kernels
from vllm_ms_models.kernels.low_rank import Addend, LowRank
from vllm_ms_models.kernels.paged_sequences import PagedSequences
from vllm_ms_models.kernels.routing import Routing
from vllm_ms_models.kernels.weight import Integers, Weight


class AscendKernels(Kernels):
    """Kernels as calls of `operators`; see `Kernels` for what each method does, the package for what is missing.

    `operators` is the module of that name or, in tests, an object with its functions.
    """

    name: ClassVar[str] = "ascend"
    own_memory: ClassVar[bool] = True

    def __init__(self, fused: Any = operators) -> None:
        self._ops = fused
        self._low_rank = LowRankProducts(fused)
        self._dense = dense.Dense(fused, self._low_rank)
        self._experts = Experts(fused, self._dense)
        self.sampling = DeviceSampling(fused)
        self._attention = Attention(fused, self._dense)
        self._latent = LatentAttention(fused, self._dense, self._attention)

    def describe(self) -> str:
        return "Ascend (fused operators; not run on hardware)"

    # --- memory ------------------------------------------------------------------------------------------------

    def place(self, x: Tensor) -> Tensor:
        return self._ops.to_device(x)

    def fetch(self, x: Tensor) -> Tensor:
        return self._ops.to_host(x)

    def take_rows(self, x: Tensor, rows: np.ndarray) -> Tensor:
        if len(rows) == 0:
            return mint.zeros((0, *x.shape[1:]), dtype=x.dtype)
        return self._ops.gather(x, self._ops.to_device(Tensor(rows.astype(np.int32))))

    def memory(self) -> tuple[int, int]:
        return self._ops.memory()

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

    def settle(self, weight: Weight, dtype: ms.Type) -> None:
        if isinstance(weight, integers.FloatInputWeight):
            integers.settle(self._ops, weight, dtype)

    def settle_experts(
        self, gate_up: Sequence[Weight], down: Sequence[Weight], biased: tuple[bool, bool], dtype: ms.Type
    ) -> None:
        if self._experts.stacks((gate_up, down), biased, dtype) is None:
            for weight in (*gate_up, *down):
                self.settle(weight, dtype)

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
        return routing_on_ascend.choose(self._ops, self._dense, logits, routing, bias)

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
        total = residual + x
        return self.layer_norm(total, weight, bias, eps), total

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
    ) -> tuple[Tensor, Tensor]:
        return self._dense.rotary(query, key, positions, cos_sin, head_size, interleaved, offset)

    # --- attention ---------------------------------------------------------------------------------------------

    def cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, storage: ms.Type | None = None
    ) -> tuple[int, int, int, int, int]:
        """A block's keys, then its values, position by position; see `caches`."""
        return caches.shape(num_blocks, block_size, num_kv_heads, head_size, storage)

    def write_kv(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        self._attention.write(key, value, cache, slots)

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
        return self._attention.attend(query, cache, sequences, scale, window, soft_cap, causal, sinks)

    # --- multi-head latent attention ---------------------------------------------------------------------------

    def latent_cache_shape(self, num_blocks: int, block_size: int, width: int) -> tuple[int, int, int]:
        return self._latent.cache_shape(num_blocks, block_size, width)

    def write_latent(self, latent: Tensor, key: Tensor, cache: Tensor, slots: Tensor) -> None:
        self._latent.write(latent, key, cache, slots)

    def mla_attention(
        self, query: Tensor, cache: Tensor, sequences: PagedSequences, scale: float, value_size: int
    ) -> Tensor:
        return self._latent.attend(query, cache, sequences, scale, value_size)

    def mla_prefill(
        self,
        query: Tensor,
        cache: Tensor,
        sequences: PagedSequences,
        keys: Sequence[Weight],
        values: Sequence[Weight],
        scale: float,
    ) -> Tensor:
        return self._latent.prefill(query, cache, sequences, keys, values, scale)
