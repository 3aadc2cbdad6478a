"""Products, embeddings, norms, activations and rotary embedding of the Ascend back end. **Not run on hardware.**"""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend import dtypes, integers
from vllm_ms_models.kernels.ascend.dtypes import check
from vllm_ms_models.kernels.ascend.integers import FloatInputWeight
from vllm_ms_models.kernels.ascend.low_rank import LowRankProducts
from vllm_ms_models.kernels.ascend.weights import Int8Weight, StaticPart, static_parts
from vllm_ms_models.kernels.low_rank import Addend
from vllm_ms_models.kernels.weight import Weight

_CLAMPED = 7.0  # how large gate and up can be in gpt-oss's activation
_TABLES = 4  # of angles that are kept; those of images, and of positions with sections, are others at each step
# Features that ApplyRotaryPosEmb turns: so that halves are whole blocks of 32 bytes. Qwen2.5-VL's towers have 80.
_ROTARY_MULTIPLE = 32


class Dense:
    """What `AscendKernels` does without sequences, by calls of `fused` (the functions of `operators`)."""

    def __init__(self, fused: Any, low_rank: LowRankProducts) -> None:
        self._ops, self._low_rank = fused, low_rank
        # By the identity of what is kept beside it, so that nothing else can get that.
        self._placed: dict[tuple[int, ms.Type], tuple[Tensor, Tensor]] = {}
        self._turns: dict[tuple[int, ms.Type], tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]] = {}
        self._static: dict[tuple[int, ms.Type], tuple[Int8Weight, tuple[StaticPart, ...]]] = {}

    def constant(self, x: Tensor, dtype: ms.Type) -> Tensor:
        """A layer's parameter, loaded into the host's memory, on the device in `dtype`: copied at first use."""
        key = id(x), dtype
        if key not in self._placed:
            self._placed[key] = x, self._ops.to_device(x).astype(dtype)
        return self._placed[key][1]

    # --- products ----------------------------------------------------------------------------------------------

    def linear(
        self, x: Tensor, weight: Weight, bias: Tensor | None, dtype: ms.Type, addend: Addend | None = None
    ) -> Tensor:
        if x.ndim != 2 or x.shape[1] != weight.in_features:
            raise ValueError(f"expected [tokens, {weight.in_features}], got {x.shape}")
        if x.shape[0] == 0:
            return mint.zeros((0, weight.out_features), dtype=dtype)
        if isinstance(weight, FloatInputWeight):
            product = integers.product(self._ops, x, weight)
        elif isinstance(weight, Int8Weight):
            product = self._int8_product(x, weight)
        elif x.dtype == weight.dtype:
            product = self._ops.matmul(x, weight.data)
        else:  # while loading only: to see what a matrix makes of unit vectors
            x = self._ops.to_device(x.astype(ms.float32))
            product = self._ops.matmul(x, weight.data.astype(ms.float32))
        product = product if bias is None else product + self.constant(bias, product.dtype)
        product = product if addend is None else self._low_rank.add(product, addend)
        return product.astype(dtype)

    def _int8_product(self, x: Tensor, weight: Int8Weight) -> Tensor:
        assert weight.integers is not None
        if weight.integers.activations == "dynamic":
            if x.dtype not in dtypes.TAKEN:  # as above, of unit vectors
                rows = weight.data.astype(ms.float32) * weight.scales.reshape(-1, 1)
                return self._ops.matmul(self._ops.to_device(x.astype(ms.float32)), rows)
            rounded, token_scales = self._ops.quantize_by_token(x)
            return self._ops.quant_matmul(rounded, weight.data, weight.scales, weight.addends, token_scales, x.dtype)
        check(x)
        key = id(weight), x.dtype
        if key not in self._static:
            self._static[key] = weight, static_parts(self._ops, weight, x.dtype)
        return self.static_product(x, self._static[key][1])

    def static_product(self, x: Tensor, parts: Sequence[StaticPart]) -> Tensor:
        products: tuple[Tensor, ...] = ()
        for part in parts:
            rounded = self._ops.quantize(x, part.input_scales, part.input_offsets)
            product = self._ops.quant_matmul(rounded, part.values, part.scales, part.addends, None, x.dtype)
            products = (*products, product)
        return products[0] if len(products) == 1 else mint.cat(products, -1)

    def split(self, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """The columns of `x` as contiguous tensors `[tokens, size]`."""
        if x.shape[0] == 0:
            return tuple(mint.zeros((0, size), dtype=x.dtype) for size in sizes)
        return tuple(part.contiguous() for part in mint.split(x, list(sizes), 1))

    def linear_gated(
        self, x: Tensor, weight: Weight, activation: str, bias: Tensor | None, addend: Addend | None = None
    ) -> Tensor:
        if len(weight.sizes) != 2 or len(set(weight.sizes)) != 1:
            raise ValueError(f"gate and up have the sizes {weight.sizes}")
        return self.gate(self.linear(x, weight, bias, x.dtype, addend), weight.sizes, activation)

    def gate(self, product: Tensor, sizes: Sequence[int], activation: str) -> Tensor:
        """`activation(gate) * up` of `product`, which has the two side by side."""
        if activation not in ("silu", "gelu", "gelu_tanh", "clamped_swiglu"):
            raise ValueError(f"there is no gated activation {activation!r}")
        if product.shape[0] == 0:
            return mint.zeros((0, sizes[0]), dtype=product.dtype)
        return self.gated(product, sizes, activation)

    def gated(self, product: Tensor, sizes: Sequence[int], activation: str) -> Tensor:
        """`gate` of one row at least."""
        if activation == "silu":
            return self._ops.swiglu(product)
        gate, up = self.split(product, sizes)
        if activation == "clamped_swiglu":
            gate = mint.clamp(gate.astype(ms.float32), max=_CLAMPED)
            up = mint.clamp(up.astype(ms.float32), -_CLAMPED, _CLAMPED)
            return (gate * self._ops.sigmoid(gate * 1.702) * (up + 1.0)).astype(product.dtype)
        return self.activate(gate, activation) * up

    def linear_heads(self, x: Tensor, matrices: Sequence[Tensor], passed: int) -> Tensor:
        """`Kernels.linear_heads` with matrices `[out, in]`."""
        out, features = matrices[0].shape
        tokens = x.shape[0]
        if tokens == 0:
            return mint.zeros((0, len(matrices) * (out + passed)), dtype=x.dtype)
        parts = []
        for head, matrix in enumerate(matrices):
            start = head * (features + passed)
            parts.append(self._ops.matmul(mint.narrow(x, 1, start, features).contiguous(), matrix))
            if passed:
                parts.append(mint.narrow(x, 1, start + features, passed))
        return mint.cat(parts, -1)

    def embedding(self, ids: Tensor, weight: Weight, first_row: int) -> Tensor:
        if ids.shape[0] == 0:
            return mint.zeros((0, weight.in_features), dtype=weight.dtype)
        return self.looked_up(ids, weight, first_row)

    def looked_up(self, ids: Tensor, weight: Weight, first_row: int) -> Tensor:
        """`embedding` of one token at least."""
        rows = ids.astype(ms.int32) - first_row
        inside = mint.clamp(rows, 0, weight.out_features - 1)  # no other row may be asked for
        known = mint.eq(rows, inside).astype(weight.dtype).reshape(-1, 1)
        return self._ops.gather(weight.data, inside) * known

    # --- elementwise -------------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        check(x)
        size = weight.shape[0]
        if x.ndim == 0 or x.shape[-1] % size:
            raise ValueError(f"expected [..., {size}] or a multiple, got {x.shape}")
        if 0 in x.shape:
            return x.copy()
        return self.normed(x.reshape(-1, size), weight, eps).reshape(x.shape)

    def normed(self, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`rms_norm` of at least one row, each as long as the weight."""
        if eps > 1:  # more than RmsNorm is documented for: what layers/scale.py multiplies by
            wide = rows.astype(ms.float32)
            means = mint.mean(wide * wide, -1, True) + eps
            return (wide * mint.rsqrt(means) * self.constant(weight, ms.float32)).astype(rows.dtype)
        return self._ops.rms_norm(rows, self.constant(weight, rows.dtype), float(eps))

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        check(x)
        if x.shape != residual.shape:
            raise ValueError(f"x is {x.shape}, the residual {residual.shape}")
        if 0 in x.shape:
            return x.copy(), residual
        return self.added_and_normed(x, residual, weight, eps)

    def added_and_normed(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`add_rms_norm` of one row at least."""
        if weight.shape[0] != x.shape[-1]:  # of each head: no operator adds first
            total = residual + x
            return self.rms_norm(total, weight, eps), total
        normed, total = self._ops.add_rms_norm(x, residual, self.constant(weight, x.dtype), float(eps))
        return normed, total

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        check(x)
        if not x.shape[-1:] == weight.shape == bias.shape:
            raise ValueError(f"x is {x.shape}, the weight {weight.shape}, the bias {bias.shape}")
        if 0 in x.shape:
            return x.copy()
        return self.layer_normed(x, weight, bias, eps)

    def layer_normed(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """`layer_norm` of one row at least."""
        gamma, beta = self.constant(weight, x.dtype), self.constant(bias, x.dtype)
        return self._ops.layer_norm(x, gamma, beta, float(eps))

    def activate(self, x: Tensor, activation: str) -> Tensor:
        check(x)
        if 0 in x.shape:
            return x.copy()
        return self.activated(x, activation)

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """`activate` of one row at least."""
        if activation == "silu":
            return self._ops.silu(x)
        if activation in ("gelu", "gelu_tanh"):
            return self._ops.gelu(x, "tanh" if activation == "gelu_tanh" else "none")
        if activation == "quick_gelu":
            return x * self._ops.sigmoid(x * 1.702)
        if activation == "relu":
            return self._ops.relu(x)
        raise ValueError(f"there is no activation {activation!r}")

    # --- rotary embedding --------------------------------------------------------------------------------------

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
        """The operator turns whole heads by halves: what turns is cut out, and put in that order if it is not."""
        check(query)
        size = cos_sin.shape[1]
        if not 0 <= offset <= head_size - size:
            raise ValueError(f"{size} features from feature {offset} on cannot rotate in a head of {head_size}")
        tokens = positions.shape[0]
        if tokens == 0:
            return query, key
        return self.rotated(query, key, self._angles(positions, cos_sin, query.dtype), head_size, interleaved, offset)

    def rotated(
        self,
        query: Tensor,
        key: Tensor,
        angles: tuple[Tensor, Tensor, Tensor],
        head_size: int,
        interleaved: bool,
        offset: int,
    ) -> tuple[Tensor, Tensor]:
        """`rotary` of what fits, for one token at least, by cosines, sines, and the number of tokens."""
        cos, sin, count = angles
        size, tail = cos.shape[1], head_size - offset
        queries = query.view(-1, query.shape[1] // head_size, head_size)
        keys = key.view(-1, key.shape[1] // tail, tail)
        turned_queries = _by_halves(self.features(queries, offset, size), interleaved)
        turned_keys = _by_halves(self.features(keys, 0, size), interleaved)
        if size % _ROTARY_MULTIPLE:
            turned_queries, turned_keys = _turned(turned_queries, cos, sin), _turned(turned_keys, cos, sin)
        else:
            turned_queries, turned_keys = self._ops.apply_rotary_pos_emb(
                turned_queries.view(-1, queries.shape[1] * size),
                turned_keys.view(-1, keys.shape[1] * size),
                cos,
                sin,
                count,
            )
        turned_queries = _from_halves(turned_queries.view(-1, queries.shape[1], size), interleaved)
        turned_keys = _from_halves(turned_keys.view(-1, keys.shape[1], size), interleaved)
        return (
            self._replaced(queries, offset, turned_queries).view(-1, query.shape[1]),
            self._replaced(keys, 0, turned_keys).view(-1, key.shape[1]),
        )

    def features(self, heads: Tensor, start: int, count: int) -> Tensor:
        """So many features of each head of `[tokens, heads, size]`, from `start` on."""
        return heads if count == heads.shape[2] else mint.narrow(heads, 2, start, count)

    def _replaced(self, heads: Tensor, start: int, middle: Tensor) -> Tensor:
        """`heads` `[tokens, heads, size]` with `middle` in place of as many features from `start` on."""
        size = heads.shape[2]
        stop = start + middle.shape[2]
        if start == 0 and stop == size:
            return middle
        if start == 0:
            return mint.cat((middle, self.features(heads, stop, size - stop)), -1)
        before = self.features(heads, 0, start)
        if stop == size:
            return mint.cat((before, middle), -1)
        return mint.cat((before, middle, self.features(heads, stop, size - stop)), -1)

    def _angles(self, positions: Tensor, cos_sin: Tensor, dtype: ms.Type) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines and sines `[tokens, size]`, and how many tokens there are: as if of one sequence, row by row.

        All layers of a step pass the same positions, so they are gathered for the first that has a table.
        """
        key = id(cos_sin), dtype
        if key not in self._turns or self._turns[key][0] is not positions:
            count = self._ops.to_device(Tensor([positions.shape[0]], ms.int32))
            self._turns.pop(key, None)  # so that those not asked for longest come first
            self._turns[key] = positions, cos_sin, (*self.turns(positions, cos_sin, dtype), count)
            if len(self._turns) > _TABLES:
                old = next(iter(self._turns))
                del self._turns[old]
                self._placed.pop((old[0], ms.float32), None)
        return self._turns[key][2]

    def turns(self, positions: Tensor, cos_sin: Tensor, dtype: ms.Type) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[tokens, size]`, each for both halves of a head."""
        rows = self._ops.gather(self.constant(cos_sin, ms.float32), positions.astype(ms.int32)).astype(dtype)
        half = cos_sin.shape[1] // 2
        cos, sin = self.split(rows, (half, half))
        return mint.cat((cos, cos), -1), mint.cat((sin, sin), -1)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads `[tokens, heads, size]` turned by halves, by plain operators, in float32 inside."""
    size, half = heads.shape[2], heads.shape[2] // 2
    wide = heads.astype(ms.float32)
    other = mint.cat((-mint.narrow(wide, 2, half, half), mint.narrow(wide, 2, 0, half)), -1)
    cosines, sines = (each.astype(ms.float32).reshape(-1, 1, size) for each in (cos, sin))
    return (wide * cosines + other * sines).astype(heads.dtype)


def _by_halves(heads: Tensor, interleaved: bool) -> Tensor:
    """Heads `[tokens, heads, size]` with the first of every pair before all the second."""
    if not interleaved:
        return heads.contiguous()
    count, size = heads.shape[1], heads.shape[2]
    pairs = heads.contiguous().view(-1, count, size // 2, 2)
    return mint.transpose(pairs, -1, -2).contiguous().view(-1, count, size)


def _from_halves(heads: Tensor, interleaved: bool) -> Tensor:
    """The opposite of `_by_halves`."""
    if not interleaved:
        return heads
    count, size = heads.shape[1], heads.shape[2]
    halves = heads.view(-1, count, 2, size // 2)
    return mint.transpose(halves, -1, -2).contiguous().view(-1, count, size)
