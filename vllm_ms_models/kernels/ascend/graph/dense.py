"""Products, norms and rotation as parts of a compiled graph. **Not run on hardware.**"""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend.dense import Dense
from vllm_ms_models.kernels.ascend.graph.weights import GraphWeight
from vllm_ms_models.kernels.low_rank import Addend
from vllm_ms_models.kernels.weight import Weight


class GraphDense(Dense):
    """The same products, norms and rotation, of operands that are constants of the graph, for a token at least."""

    def constant(self, x: Tensor, dtype: ms.Type) -> Tensor:
        return x.astype(dtype)

    def linear(
        self, x: Tensor, weight: Weight, bias: Tensor | None, dtype: ms.Type, addend: Addend | None = None
    ) -> Tensor:
        assert isinstance(weight, GraphWeight) and addend is None
        product = self.product(x, weight)
        product = product if bias is None else product + self.constant(bias, product.dtype)
        return product.astype(dtype)

    def product(self, x: Tensor, weight: GraphWeight) -> Tensor:
        """`x @ weight.T` in the dtype of `x`."""
        if weight.kind == "floats":
            return self._ops.matmul(x, weight.data)
        if weight.kind == "static":
            return self.static_product(x, weight.parts)
        values, scales, addends = weight.data, weight.scales, weight.addends
        if weight.kind == "packed":
            return self._ops.weight_quant_matmul(x, values, scales, addends, weight.group_size)
        rounded, token_scales = self._ops.quantize_by_token(x)
        return self._ops.quant_matmul(rounded, values, scales, addends, token_scales, x.dtype)

    def split(self, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = ()
        first = 0
        for size in sizes:
            parts = (*parts, x[:, first : first + size])
            first += size
        return parts

    def gate(self, product: Tensor, sizes: Sequence[int], activation: str) -> Tensor:
        return self.gated(product, sizes, activation)

    def embedding(self, ids: Tensor, weight: Weight, first_row: int) -> Tensor:
        return self.looked_up(ids, weight, first_row)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.normed(x.reshape(-1, weight.shape[0]), weight, eps).reshape(-1, x.shape[-1])

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self.added_and_normed(x, residual, weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return self.layer_normed(x, weight, bias, eps)

    def activate(self, x: Tensor, activation: str) -> Tensor:
        return self.activated(x, activation)

    def rotary(self, query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor, *of_heads: Any) -> Any:
        count = mint.sum(positions * 0 + 1).astype(ms.int32).reshape(1)
        return self.rotated(query, key, (*self.turns(positions, cos_sin, query.dtype), count), *of_heads)

    def features(self, heads: Tensor, start: int, count: int) -> Tensor:
        return heads if count == heads.shape[2] else heads[:, :, start : start + count]
