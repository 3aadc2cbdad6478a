"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), with the up-projections absorbed.

A position is cached as one row for all heads: its latent c (`kv_lora_rank` values, normalised) and a rotated key r
(`qk_rope_head_dim` values). Head h would see the key (K_h c, r) and the value V_h c, K_h and V_h being its rows of
kv_b_proj. Since (K_h c).q = c.(K_h' q), the query is multiplied by K_h' instead, once; attention is over (c, r) as they
are cached, and its result a mean of latents, which V_h turns into the head's value. No position is ever expanded.
"""

from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.kernels import Weight
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import (
    ColumnParallelLinear,
    Linear,
    ReplicatedLinear,
    RowParallelLinear,
    column_part,
)
from vllm_ms_models.layers.norm import RMSNorm
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.quantization.base import LinearScheme, Part

NORM_EPS = 1e-6  # of the norms within attention, whatever rms_norm_eps says (transformers: their class's default)


class LatentAttention(Layer):
    """Causal attention of one layer over the paged cache of latents.

    `name`, `cache`: as of `Attention`. A position takes `width` values, the first `value_size` of which are its value.
    """

    def __init__(self, name: str, num_heads: int, width: int, value_size: int, scale: float) -> None:
        super().__init__()
        self.name = name
        self.num_heads = num_heads
        self.width = width
        self.value_size = value_size
        self.scale = scale
        self.kernels = kernels.get()
        self.cache: Tensor | None = None

    def construct(self, query: Tensor, latent: Tensor, batch: Batch) -> Tensor:
        """`[tokens, heads * width]` queries, `[tokens, width]` latents -> `[tokens, heads * value_size]`."""
        view = batch.caches[self.name]
        self.kernels.write_latent(latent, self.cache, view.slots)
        return self.kernels.mla_attention(query, self.cache, view.sequences, self.scale, self.value_size)


class LatentProjection(Linear):
    """kv_a_proj_with_mqa: `[tokens, hidden]` -> latents `[tokens, rank]` and keys to rotate `[tokens, rope]`."""

    def __init__(self, name: str, hidden_size: int, rank: int, rope: int, context: ModelContext, bias: bool) -> None:
        shape, columns = (rank + rope, hidden_size), slice(0, hidden_size)
        parts = [Part(name, shape, rows, columns) for rows in (slice(0, rank), slice(rank, rank + rope))]
        super().__init__(parts, bias, context)

    def construct(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.scheme.multiply_split(x)


class AbsorbedProjection(Layer):
    """kv_b_proj, `[heads * (nope + value), rank]`, as the two matrices of each head that take its place.

    They have the model's dtype, however the checkpoint has quantized kv_b_proj: a scheme's matrix is, by definition,
    what unit vectors give when it multiplies them in float32. ValueError, after loading, for a scheme that rounds
    activations by a fixed scale, as no unit vector passes that unharmed.
    """

    def __init__(
        self, name: str, num_heads: int, rank: int, nope_size: int, value_size: int, context: ModelContext
    ) -> None:
        super().__init__()
        group = context.tensor_parallel
        self.name = name
        self.num_heads = group.share(num_heads, f"The number of heads of {name}")
        self.rank, self.nope_size, self.value_size, self.dtype = rank, nope_size, value_size, context.dtype
        self.kernels = kernels.get()
        part = column_part(name, rank, num_heads * (nope_size + value_size), group)
        self.scheme: LinearScheme | None = context.quantization.linear([part], False, context.dtype)
        self.absorbing: list[Weight] = []  # K' of each head, [rank, nope]
        self.expanding: list[Weight] = []  # V, [value, rank]

    def slots(self) -> Iterator[Slot]:
        assert self.scheme is not None, "weights are loaded once"
        yield from self.scheme.slots()

    def finish_loading(self) -> None:
        assert self.scheme is not None, "weights are loaded once"
        self.scheme.finish()
        integers = getattr(getattr(self.scheme, "weight", None), "integers", None)
        if integers is not None and integers.activations == "static":
            raise ValueError(
                f"{self.name} is quantized for activations of a fixed scale, which multi-head latent attention cannot "
                "absorb; leave it out of the quantization, or quantize its activations by token."
            )
        columns = self.scheme.multiply(Tensor.from_numpy(np.eye(self.rank, dtype=np.float32)), ms.float32)
        heads = columns.asnumpy().T.reshape(self.num_heads, self.nope_size + self.value_size, self.rank)
        self.scheme = None  # and its memory
        for head in heads:
            self.absorbing.append(self._weight(head[: self.nope_size].T))
            self.expanding.append(self._weight(head[self.nope_size :]))

    def _weight(self, values: np.ndarray) -> Weight:
        weight = self.kernels.new_weight(values.shape[:1], values.shape[1], self.dtype)
        self.kernels.load_rows(weight, 0, 0, np.ascontiguousarray(values))
        return weight

    def absorb(self, query: Tensor, rope_size: int) -> Tensor:
        """`[tokens, heads * (nope + rope)]` -> `[tokens, heads * (rank + rope)]`; the parts to rotate stay."""
        return self.kernels.linear_heads(query, self.absorbing, rope_size)

    def expand(self, latent: Tensor) -> Tensor:
        """Means of latents `[tokens, heads * rank]` -> `[tokens, heads * value]`."""
        return self.kernels.linear_heads(latent, self.expanding)


class MultiHeadLatentAttention(Layer):
    """The attention block of DeepSeek-V2 and V3: `[tokens, hidden]` -> `[tokens, hidden]`.

    `config` has the sizes by Hugging Face's names; without `q_lora_rank` the query is not compressed. `rotary` rotates
    behind `kv_lora_rank` features. The softmax scale is (nope + rope)^-0.5 times the rope's `softmax_factor`.
    """

    def __init__(self, config: Any, rotary: RotaryEmbedding, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        key_size = config.qk_nope_head_dim + rope
        self.compressed = config.q_lora_rank is not None
        if not self.compressed:
            self.q_proj = ColumnParallelLinear(f"{prefix}.q_proj", hidden, heads * key_size, context)
        else:
            self.q_a_proj = ReplicatedLinear(f"{prefix}.q_a_proj", hidden, config.q_lora_rank, context, bias)
            self.q_a_layernorm = RMSNorm(f"{prefix}.q_a_layernorm", config.q_lora_rank, NORM_EPS)
            self.q_proj = ColumnParallelLinear(f"{prefix}.q_b_proj", config.q_lora_rank, heads * key_size, context)
        self.kv_a_proj = LatentProjection(f"{prefix}.kv_a_proj_with_mqa", hidden, rank, rope, context, bias)
        self.kv_a_layernorm = RMSNorm(f"{prefix}.kv_a_layernorm", rank, NORM_EPS)
        self.kv_b_proj = AbsorbedProjection(
            f"{prefix}.kv_b_proj", heads, rank, config.qk_nope_head_dim, config.v_head_dim, context
        )
        self.o_proj = RowParallelLinear(f"{prefix}.o_proj", heads * config.v_head_dim, hidden, context, bias)
        self.rope_size, self.rotary = rope, rotary
        scale = key_size**-0.5 * rotary.softmax_factor
        self.attention = LatentAttention(f"{prefix}.attn", self.kv_b_proj.num_heads, rank + rope, rank, scale)

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        source = self.q_a_layernorm(self.q_a_proj(hidden)) if self.compressed else hidden
        query = self.kv_b_proj.absorb(self.q_proj(source), self.rope_size)
        latent, key = self.kv_a_proj(hidden)
        row = mint.cat((self.kv_a_layernorm(latent), key), 1)
        self.rotary(query, row, batch.positions)
        return self.o_proj(self.kv_b_proj.expand(self.attention(query, row, batch)))
