"""`AscendKernels` whose calls a compiled graph can be made of. **Not run on hardware.**"""

from collections.abc import Sequence
from typing import Any, ClassVar

import mindspore as ms
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend import operators
from vllm_ms_models.kernels.ascend.experts import Stacked
from vllm_ms_models.kernels.ascend.graph import sequences
from vllm_ms_models.kernels.ascend.graph.dense import GraphDense
from vllm_ms_models.kernels.ascend.graph.experts import GraphExperts, kept
from vllm_ms_models.kernels.ascend.graph.latent_attention import GraphLatentAttention
from vllm_ms_models.kernels.ascend.graph.weights import GraphWeight, graph_weight
from vllm_ms_models.kernels.ascend.kernels import AscendKernels
from vllm_ms_models.kernels.ascend.prepared import triangle
from vllm_ms_models.kernels.ascend.routing import chosen
from vllm_ms_models.kernels.paged_sequences import PagedSequences
from vllm_ms_models.kernels.routing import Routing
from vllm_ms_models.kernels.weight import Weight


class AscendGraphKernels(AscendKernels):
    """`AscendKernels` for layers that are compiled, whose sequences are those of `sequences.taken`, and slots int32."""

    name: ClassVar[str] = "ascend-graph"
    compiled: ClassVar[bool] = True

    def __init__(self, fused: Any = operators) -> None:
        super().__init__(fused)
        self._beside = AscendKernels(fused)
        self._latents = GraphLatentAttention(fused)
        self._parameters = 0

    def describe(self) -> str:
        return "Ascend (fused operators in graphs; not run on hardware)"

    @property
    def beside_graphs(self) -> AscendKernels:
        return self._beside

    def start_graphs(self, dtype: ms.Type) -> None:
        """Called once, when all is loaded, which is done operator by operator: from here on weights are those of
        `graph_weight` and `stacked`, and other tensors of layers `parameter`s. `dtype` is that of activations."""
        dense = GraphDense(self._ops, self._low_rank)
        self._dense, self._graph_experts = dense, GraphExperts(self._ops, dense)
        self.triangle = self.parameter(self._ops.to_device(triangle(dtype)), "triangle")

    def graph_weight(self, weight: Weight, dtype: ms.Type) -> GraphWeight:
        """What products take in place of `weight`, for activations of `dtype`."""
        return graph_weight(self._ops, weight, dtype, lambda x: self.parameter(x, "weight"))

    def graph_experts(
        self, gate_up: Sequence[Weight], down: Sequence[Weight], biased: tuple[bool, bool], whole: bool, dtype: ms.Type
    ) -> tuple[Stacked, Stacked] | None:
        """What `experts` takes in place of these weights; None if GroupedMatmulV4 does not multiply them."""
        stacks = self._experts.stacks((gate_up, down), biased, dtype)
        if stacks is None:
            return None
        first, second = (kept(each, whole, lambda x: self.parameter(x, "weight")) for each in stacks)
        return first, second

    def stacked(self, weights: Sequence[Weight]) -> ms.Parameter:
        """Matrices of floats as one tensor `[weights, out, in]`."""
        return self.parameter(mint.cat([weight.data.reshape(1, *weight.data.shape) for weight in weights]), "weight")

    def parameter(self, x: Tensor, name: str) -> ms.Parameter:
        """`x` itself as one, under a name of its own. (Made of it at once, it would be copied by NumPy.)"""
        self._parameters += 1
        made = ms.Parameter(mint.zeros(1), name=f"{name}.{self._parameters}", requires_grad=False)
        made.assign_value(x)
        return made

    def new_cache(self, shape: tuple[int, ...], dtype: ms.Type) -> Any:
        """Keys and values apart, `[blocks, block_size, kv_heads, head_size]` each; latents as keys of one head."""
        latents = len(shape) == 3
        shapes = [(*shape[:2], 1, shape[2])] if latents else [(shape[0], *shape[2:])] * 2
        return ms.ParameterTuple([self.parameter(mint.zeros(each, dtype=dtype), "cache") for each in shapes])

    def kind_of(
        self, batch: PagedSequences, block_size: int, window: int | None, heads: int, size: int
    ) -> tuple[str, tuple[Tensor, ...]]:
        """What `sequences.describe` says of them, for layers with that window and so many heads of `size`."""
        step = self._attention.prepare(batch)
        return sequences.describe(step, block_size, window, self._attention.takes_flash(step, heads, size))

    # --- in a graph --------------------------------------------------------------------------------------------

    def choose_experts(self, logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return chosen(self._ops, self._dense, logits, routing, bias)

    def experts(
        self,
        x: Tensor,
        gate_up: Any,
        down: Any,
        ids: Tensor,
        shares: Tensor,
        activation: str,
        addend: Tensor | None = None,
        first_expert: int = 0,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Tensor:
        """Of weights as `graph_experts` has them; of a list of others one by one, which is not compiled."""
        biases = gate_up_bias, down_bias
        if not isinstance(gate_up, Stacked):
            return self._experts.one_by_one(
                self, x, gate_up, down, ids, shares, activation, addend, first_expert, biases
            )
        stacks = gate_up, down
        return self._graph_experts.grouped(x, stacks, ids, shares, activation, addend, first_expert, biases)

    def write_kv(self, key: Tensor, value: Tensor, cache: Any, slots: Tensor) -> None:
        self._ops.reshape_and_cache(key, value, cache[0], cache[1], slots)

    def paged_attention(
        self,
        query: Tensor,
        cache: Any,
        pages: Any,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        causal: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """The window is in the mask, and in the tables; of soft caps and sinks no graph is made."""
        assert soft_cap is None and sinks is None
        keys, values = cache[0], cache[1]
        _, _, kv_heads, size = keys.shape
        heads = query.shape[1] // size
        if "tables" not in pages:
            rows, lengths = pages["slots"], pages["lengths"]
            key = self._ops.gather(keys.reshape(-1, kv_heads * size), rows)
            value = self._ops.gather(values.reshape(-1, kv_heads * size), rows)
            triangle = self.triangle if causal else None
            return self._ops.flash_attention(query, key, value, triangle, lengths, lengths, heads, scale)
        hidden, counts = sequences.hidden(pages)
        tables, lengths = pages["tables"], pages["lengths"]
        return self._ops.paged_attention(
            query, keys, values, tables, lengths, hidden, counts, heads, kv_heads, scale, 0
        )

    def write_latent(self, latent: Tensor, key: Tensor, cache: Any, slots: Tensor) -> None:
        self._ops.reshape_and_cache(mint.cat((latent, key), -1), None, cache[0], None, slots)

    def mla_prefill(self, query: Tensor, cache: Any, pages: Any, keys: Any, values: Any, scale: float) -> Tensor:
        """`keys` and `values` are those of `stacked`."""
        return self._latents.attend(query, cache[0], pages, keys, values, scale, self.triangle)
