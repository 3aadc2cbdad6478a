"""`AscendKernels` whose calls a compiled graph can be made of. **Not run on hardware.**"""

from typing import Any, ClassVar

import mindspore as ms
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend import operators
from vllm_ms_models.kernels.ascend.graph.dense import GraphDense
from vllm_ms_models.kernels.ascend.graph.weights import GraphWeight, graph_weight
from vllm_ms_models.kernels.ascend.kernels import AscendKernels
from vllm_ms_models.kernels.interface import PagedSequences
from vllm_ms_models.kernels.weight import Weight


class AscendGraphKernels(AscendKernels):
    """`AscendKernels` for layers that are compiled, whose sequences are those of `sequences_of`, and slots int32."""

    name: ClassVar[str] = "ascend-graph"

    def __init__(self, fused: Any = operators) -> None:
        super().__init__(fused)
        self._parameters = 0

    def describe(self) -> str:
        return "Ascend (fused operators in graphs; not run on hardware)"

    def start_graphs(self) -> None:
        """Called once, when all is loaded, which is done operator by operator: from here on weights are those of
        `graph_weight`, and other tensors of layers `parameter`s."""
        self._dense = GraphDense(self._ops, self._low_rank)

    def graph_weight(self, weight: Weight, dtype: ms.Type) -> GraphWeight:
        """What products take in place of `weight`, for activations of `dtype`."""
        return graph_weight(self._ops, weight, dtype, lambda x: self.parameter(x, "weight"))

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
