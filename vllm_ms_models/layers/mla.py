"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

A position is cached as one row for all heads: its latent c (`kv_lora_rank` values, normalised) and a rotated key r
(`qk_rope_head_dim` values). Head h sees the key (K_h c, r) and the value V_h c, where K_h and V_h are its rows of
kv_b_proj. There are two ways to compute that:

* *absorbed*: since (K_h c).q = c.(K_h' q), the query is multiplied by K_h', once; attention is over (c, r) as they are
  cached, and its result a mean of latents, which V_h turns into the head's value. No position is expanded: decoding.
* *expanded*: keys and values of all positions are computed, for one head at a time, and then multiplied as usual,
  with a third of the operations for each pair of a token and a position: prefill (kernels/cpu/calls_prefill.h).
"""

from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.kernels import PagedSequences, Weight
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

EXPAND_FROM = 128  # tokens of a sequence in a step; the batch has those with fewer first
NORM_EPS = 1e-6  # of the norms within attention, whatever rms_norm_eps says (transformers: their class's default)


class LatentProjection(Linear):
    """kv_a_proj_with_mqa: `[tokens, hidden]` -> latents `[tokens, rank]` and keys to rotate `[tokens, rope]`."""

    def __init__(self, name: str, hidden_size: int, rank: int, rope: int, context: ModelContext, bias: bool) -> None:
        shape, columns = (rank + rope, hidden_size), slice(0, hidden_size)
        parts = [Part(name, shape, rows, columns) for rows in (slice(0, rank), slice(rank, rank + rope))]
        super().__init__(parts, bias, context)

    def construct(self, x: Tensor, batch: Batch | None = None) -> tuple[Tensor, ...]:
        return self.scheme.multiply_split(x, self.addend(x, batch))


class LatentHeads(Layer):
    """kv_b_proj, `[heads * (nope + value), rank]`, as the matrices of each head that take its place.

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
        self.keys: list[Weight] = []  # K, [nope, rank]
        self.values: list[Weight] = []  # V, [value, rank]

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
            self.keys.append(self._weight(head[: self.nope_size]))
            self.values.append(self._weight(head[self.nope_size :]))

    def _weight(self, values: np.ndarray) -> Weight:
        weight = self.kernels.new_weight(values.shape[:1], values.shape[1], self.dtype)
        self.kernels.load_rows(weight, 0, 0, np.ascontiguousarray(values))
        return weight


class LatentAttention(Layer):
    """Causal attention of one layer over the paged cache of latents.

    `name`, `cache`: as of `Attention`. A position takes `width` values: a latent, and a key of `rope_size` values.
    """

    def __init__(self, name: str, heads: LatentHeads, rope_size: int, scale: float) -> None:
        super().__init__()
        self.name = name
        self.heads = heads
        self.num_heads = heads.num_heads
        self.rope_size = rope_size
        self.width = heads.rank + rope_size
        self.scale = scale
        self.expands = heads.value_size <= heads.nope_size + rope_size  # or the kernel has no room for values
        self.kernels = kernels.get()
        self.cache: Tensor | None = None

    def construct(self, query: Tensor, latent: Tensor, key: Tensor, batch: Batch) -> Tensor:
        """Of `[tokens, heads * (nope + rope)]` queries, latents and rotated keys: `[tokens, heads * value]`."""
        view = batch["caches"][self.name]
        self.kernels.write_latent(latent, key, self.cache, view["slots"])
        if self.kernels.compiled:
            return self._expanded(query, view["sequences"])
        if not self.expands:
            return self._absorbed(query, view.sequences)
        few, many, rows = view.split(EXPAND_FROM)
        if few is None:
            return self._expanded(query, view.sequences)
        if many is None:
            return self._absorbed(query, few)
        return mint.cat((self._absorbed(query[:rows], few), self._expanded(query[rows:], many)))

    def _absorbed(self, query: Tensor, sequences: PagedSequences) -> Tensor:
        heads = self.heads
        absorbed = self.kernels.linear_heads(query, heads.absorbing, self.rope_size)
        means = self.kernels.mla_attention(absorbed, self.cache, sequences, self.scale, heads.rank)
        return self.kernels.linear_heads(means, heads.values)

    def _expanded(self, query: Tensor, sequences: PagedSequences) -> Tensor:
        heads = self.heads
        return self.kernels.mla_prefill(query, self.cache, sequences, heads.keys, heads.values, self.scale)


class MultiHeadLatentAttention(Layer):
    """The attention block of DeepSeek-V2 and V3: `[tokens, hidden]` -> `[tokens, hidden]`.

    `config` has the sizes by Hugging Face's names; without `q_lora_rank` the query is not compressed. `rotary` rotates
    behind `qk_nope_head_dim` features of a query's head. The softmax scale is (nope + rope)^-0.5 times the rope's
    `softmax_factor`.
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
        name, sizes = f"{prefix}.kv_b_proj", (config.qk_nope_head_dim, config.v_head_dim)
        self.kv_b_proj = LatentHeads(name, heads, rank, *sizes, context)
        self.o_proj = RowParallelLinear(f"{prefix}.o_proj", heads * config.v_head_dim, hidden, context, bias)
        self.rotary = rotary
        scale = key_size**-0.5 * rotary.softmax_factor
        self.attention = LatentAttention(f"{prefix}.attn", self.kv_b_proj, rope, scale)

    def construct(self, hidden: Tensor, batch: Batch) -> Tensor:
        compressed = self.q_a_layernorm(self.q_a_proj(hidden, batch)) if self.compressed else hidden
        query = self.q_proj(compressed, batch)
        latent, key = self.kv_a_proj(hidden, batch)
        latent = self.kv_a_layernorm(latent)
        query, key = self.rotary(query, key, batch["positions"])
        return self.o_proj(self.attention(query, latent, key, batch), batch)
