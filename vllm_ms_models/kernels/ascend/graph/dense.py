"""Products, norms and rotation as parts of a compiled graph. **Not run on hardware.**"""

from collections.abc import Sequence

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
        assert isinstance(weight, GraphWeight)
        product = self.product(x, weight)
        product = product if bias is None else product + self.constant(bias, product.dtype)
        return product.astype(dtype)

    def product(self, x: Tensor, weight: GraphWeight) -> Tensor:
        """`x @ weight.T` in the dtype of `x`."""
        if weight.kind == "floats":
            return self._ops.matmul(x, weight.data)
        if weight.kind == "static":
            return self._static_product(x, weight)
        values, scales, addends = weight.data, weight.scales, weight.addends
        if weight.kind == "packed":
            return self._ops.weight_quant_matmul(x, values, scales, addends, weight.group_size)
        rounded, token_scales = self._ops.quantize_by_token(x)
        return self._ops.quant_matmul(rounded, values, scales, addends, token_scales, x.dtype)

    def _static_product(self, x: Tensor, weight: GraphWeight) -> Tensor:
        products: tuple[Tensor, ...] = ()
        for part in weight.parts:
            rounded = self._ops.quantize(x, part.input_scales, part.input_offsets)
            product = self._ops.quant_matmul(rounded, part.values, part.scales, part.addends, None, x.dtype)
            products = (*products, product)
        return products[0] if len(products) == 1 else mint.cat(products, -1)

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
        return self.gate(self.linear(x, weight, bias, x.dtype), weight.sizes, activation)

    def gate(self, product: Tensor, sizes: Sequence[int], activation: str) -> Tensor:
        if activation == "silu":
            return self._ops.swiglu(product)
        gate, up = self.split(product, sizes)
        return self.activate(gate, activation) * up

    def embedding(self, ids: Tensor, weight: Weight, first_row: int) -> Tensor:
        rows = ids.astype(ms.int32) - first_row
        inside = mint.clamp(rows, 0, weight.out_features - 1)
        return self._ops.gather(weight.data, inside) * mint.eq(rows, inside).astype(weight.dtype).reshape(-1, 1)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.normed(x.reshape(-1, weight.shape[0]), weight, eps).reshape(-1, x.shape[-1])

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if weight.shape[0] != x.shape[-1]:
            total = residual + x
            return self.rms_norm(total, weight, eps), total
        return self._ops.add_rms_norm(x, residual, self.constant(weight, x.dtype), eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return self._ops.layer_norm(x, self.constant(weight, x.dtype), self.constant(bias, x.dtype), eps)

    def activate(self, x: Tensor, activation: str) -> Tensor:
        if activation == "silu":
            return self._ops.silu(x)
        if activation == "relu":
            return self._ops.relu(x)
        if activation == "quick_gelu":
            return x * self._ops.sigmoid(x * 1.702)
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
        count = mint.sum(positions * 0 + 1).astype(ms.int32).reshape(1)
        angles = mint.cat((cos, cos), -1), mint.cat((sin, sin), -1), count
        return self.rotated(query, key, angles, head_size, interleaved, offset)

    def features(self, heads: Tensor, start: int, count: int) -> Tensor:
        return heads if count == heads.shape[2] else heads[:, :, start : start + count]
