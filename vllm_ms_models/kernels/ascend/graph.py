"""The Ascend kernels as parts of a compiled graph (`mindspore.jit`). **Not run on hardware.**

MindSpore compiles the Python of layers and kernels as it stands, for tensors of any size. What is here avoids what it
cannot: nothing is remembered from one call to the next, nothing asks for a tensor's values, no size is compared with 0
(a graph is never run for an empty batch), nothing is a view that MindSpore takes for a place to be written to, and the
batch is of dictionaries and tuples: of other containers it loses the types of what is in them. A layer's keys and
values are parameters, each `[blocks, block_size, kv_heads, head_size]`, written in place.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import mindspore as ms
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend import operators
from vllm_ms_models.kernels.ascend.dense import Dense
from vllm_ms_models.kernels.ascend.kernels import AscendKernels
from vllm_ms_models.kernels.interface import PagedSequences
from vllm_ms_models.kernels.low_rank import Addend
from vllm_ms_models.kernels.weight import Weight


class GraphDense(Dense):
    """The same products, norms and rotation, of operands that are constants of the graph, for a token at least."""

    def constant(self, x: Tensor, dtype: ms.Type) -> Tensor:
        return x.astype(dtype)

    def linear(
        self, x: Tensor, weight: Weight, bias: Tensor | None, dtype: ms.Type, addend: Addend | None = None
    ) -> Tensor:
        """Of floats; other weights are not compiled (bridge/compiling.py)."""
        product = self._ops.matmul(x, weight.data)
        product = product if bias is None else product + self.constant(bias, x.dtype)
        return product.astype(dtype)

    def split(self, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = ()
        first = 0
        for size in sizes:
            parts = (*parts, x[:, first : first + size])
            first += size
        return parts

    def linear_gated(
        self, x: Tensor, weight: Weight, activation: str, bias: Tensor | None, addend: Addend | None = None
    ) -> Tensor:
        product = self.linear(x, weight, bias, x.dtype)
        if activation == "silu":
            return self._ops.swiglu(product)
        gate, up = self.split(product, weight.sizes)
        return self.activate(gate, activation) * up

    def embedding(self, ids: Tensor, weight: Weight, first_row: int) -> Tensor:
        rows = ids.astype(ms.int32) - first_row
        inside = mint.clamp(rows, 0, weight.out_features - 1)
        return self._ops.gather(weight.data, inside) * mint.eq(rows, inside).astype(weight.dtype).reshape(-1, 1)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size, features = weight.shape[0], x.shape[-1]
        return self._ops.rms_norm(x.reshape(-1, size), self.constant(weight, x.dtype), eps).reshape(-1, features)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._ops.add_rms_norm(x, residual, self.constant(weight, x.dtype), eps)

    def activate(self, x: Tensor, activation: str) -> Tensor:
        if activation == "silu":
            return self._ops.silu(x)
        if activation == "relu":
            return self._ops.relu(x)
        return self._ops.gelu(x, "tanh" if activation == "gelu_tanh" else "none")

    def rotary(
        self,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        head_size: int,
        interleaved: bool,
        offset: int,
    ) -> tuple[Tensor, Tensor]:
        rows = self._ops.gather(self.constant(cos_sin, ms.float32), positions.astype(ms.int32)).astype(query.dtype)
        half = cos_sin.shape[1] // 2
        cos, sin = rows[:, :half], rows[:, half:]
        count = mint.sum(mint.ones_like(positions)).astype(ms.int32).reshape(1)
        angles = mint.cat((cos, cos), -1), mint.cat((sin, sin), -1), count
        return self.rotated(query, key, angles, head_size, interleaved, offset)

    def features(self, heads: Tensor, start: int, count: int) -> Tensor:
        return heads if count == heads.shape[2] else heads[:, :, start : start + count]


class AscendGraphKernels(AscendKernels):
    """`AscendKernels` for layers that are compiled, whose sequences are those of `sequences_of`, and slots int32."""

    name: ClassVar[str] = "ascend-graph"

    def __init__(self, fused: Any = operators) -> None:
        super().__init__(fused)
        self._dense = GraphDense(fused, self._low_rank)
        self._parameters = 0

    def describe(self) -> str:
        return "Ascend (fused operators in graphs; not run on hardware)"

    def new_weight(self, sizes: Sequence[int], in_features: int, dtype: ms.Type) -> Weight:
        weight = super().new_weight(sizes, in_features, dtype)
        return replace(weight, data=self.parameter(weight.data, "weight"))

    def parameter(self, x: Tensor, name: str) -> ms.Parameter:
        """`x` itself as one, under a name of its own. (Made of it at once, it would be copied by NumPy.)"""
        self._parameters += 1
        made = ms.Parameter(mint.zeros(1), name=f"{name}.{self._parameters}", requires_grad=False)
        made.assign_value(x)
        return made

    def new_cache(self, shape: tuple[int, ...], dtype: ms.Type) -> Any:
        """Keys and values apart."""
        blocks, _, *rest = shape
        zeros = [mint.zeros((blocks, *rest), dtype=dtype) for _ in range(2)]
        return ms.ParameterTuple([self.parameter(x, "cache") for x in zeros])

    def write_kv(self, key: Tensor, value: Tensor, cache: Any, slots: Tensor) -> None:
        self._ops.reshape_and_cache(key, value, cache[0], cache[1], slots)

    def paged_attention(
        self,
        query: Tensor,
        cache: Any,
        sequences: Any,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        causal: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """The window is in the mask, and in the tables."""
        keys, values = cache[0], cache[1]
        heads, kv_heads = query.shape[1] // keys.shape[3], keys.shape[2]
        tables, lengths = sequences["tables"], sequences["lengths"]
        if "mask" in sequences:
            mask, counts = sequences["mask"].astype(query.dtype), sequences["query_lens"]
            return self._ops.paged_attention(
                query, keys, values, tables, lengths, mask, counts, heads, kv_heads, scale, 0
            )
        return self._ops.paged_attention(query, keys, values, tables, lengths, None, None, heads, kv_heads, scale, 0)

    def sequences_of(
        self, sequences: PagedSequences, block_size: int, window: int | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """For layers of one window: tables, lengths, lengths of queries, and the mask, if there is one, in float32.

        (In bfloat16, which NumPy does not have, MindSpore fails to take it out of the graph's inputs.)
        """
        step = self._attention.prepare(sequences)
        span = step.span(ms.float32, window, causal, block_size, halves=False)
        return span.tables, span.lengths, step.query_lens, span.mask
