"""Multi-head latent attention on Ascend. **Not run on hardware.**

A cache of latents is one head's keys, whose first features are its values: PagedAttention with `mla_v_dim`. Long
prompts without context are expanded instead, to FlashAttentionScore, whose values are as large as its keys: the smaller
ones, and both up to the next multiple of 16, get zeros behind, which change no score and are cut off again.
"""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend import dense, dtypes
from vllm_ms_models.kernels.ascend.attention import Attention, with_rows
from vllm_ms_models.kernels.ascend.caches import HEAD_MULTIPLE
from vllm_ms_models.kernels.ascend.prepared import Prepared
from vllm_ms_models.kernels.paged_sequences import PagedSequences
from vllm_ms_models.kernels.weight import Weight


class LatentAttention:
    """What `AscendKernels` does with latents, by calls of `fused` (the functions of `operators`)."""

    def __init__(self, fused: Any, products: dense.Dense, attention: Attention) -> None:
        self._ops = fused
        self._dense = products
        self._attention = attention

    @staticmethod
    def cache_shape(num_blocks: int, block_size: int, width: int) -> tuple[int, int, int]:
        if block_size % 16:
            raise ValueError(f"blocks of {block_size} are not multiples of 16")
        return num_blocks, block_size, width

    def write(self, latent: Tensor, key: Tensor, cache: Tensor, slots: Tensor) -> None:
        dtypes.check(latent)
        if latent.shape[0] > 0:
            rows = mint.cat([latent, key], -1)
            self._ops.reshape_and_cache(rows, None, _one_head(cache), None, slots.astype(ms.int32))

    def attend(self, query: Tensor, cache: Tensor, sequences: PagedSequences, scale: float, value_size: int) -> Tensor:
        """`Kernels.mla_attention`."""
        dtypes.check(query)
        heads = query.shape[1] // cache.shape[2]
        step = self._attention.prepare(sequences)
        if step.rows == 0:
            return mint.zeros((query.shape[0], heads * value_size), dtype=query.dtype)
        rows, one = query[: step.rows].contiguous(), _one_head(cache)
        result = self._attention.paged(rows, one, one, step, heads, scale, mla_v_dim=value_size)
        return with_rows(result, query.shape[0])

    def prefill(
        self,
        query: Tensor,
        cache: Tensor,
        sequences: PagedSequences,
        keys: Sequence[Weight],
        values: Sequence[Weight],
        scale: float,
    ) -> Tensor:
        """`Kernels.mla_prefill`: expanded if no sequence has context, or else with the keys absorbed into the query."""
        dtypes.check(query)
        step = self._attention.prepare(sequences)
        size = -(-max(query.shape[1] // len(keys), values[0].out_features) // HEAD_MULTIPLE) * HEAD_MULTIPLE
        if step.rows and self._attention.takes_flash(step, len(keys), size):
            rows = query[: step.rows].contiguous()
            return with_rows(self._expanded(rows, cache, step, keys, values, scale, size), query.shape[0])
        rank = keys[0].in_features
        transposed = [mint.permute(weight.data, (1, 0)).contiguous() for weight in keys]
        absorbed = self._dense.linear_heads(query, transposed, cache.shape[2] - rank)
        means = self.attend(absorbed, cache, sequences, scale, rank)
        return self._dense.linear_heads(means, [weight.data for weight in values], 0)

    def _expanded(
        self,
        query: Tensor,
        cache: Tensor,
        step: Prepared,
        keys: Sequence[Weight],
        values: Sequence[Weight],
        scale: float,
        size: int,
    ) -> Tensor:
        """With keys and values of all heads, as `[rows, heads, size]`."""
        heads, rank, width, rows = len(keys), keys[0].in_features, cache.shape[2], query.shape[0]
        # What is cached of the rows, wherever in the batch they were written from.
        taken = self._ops.gather(cache.view(-1, width), step.slots(cache.shape[1]))
        latents = mint.narrow(taken, 1, 0, rank).contiguous()
        turned = mint.narrow(taken, 1, rank, width - rank).reshape(rows, 1, width - rank)
        key, value = (
            self._ops.matmul(latents, mint.cat([weight.data for weight in weights])).view(rows, heads, -1)
            for weights in (keys, values)
        )
        key = mint.cat([key, mint.broadcast_to(turned, (rows, heads, width - rank))], -1)
        query, key, value = (_padded(x, size) for x in (query.view(rows, heads, -1), key, value))
        result = self._attention.flash(query, key, value, step, heads, scale)
        own = mint.narrow(result.view(rows, heads, size), 2, 0, values[0].out_features)
        return own.contiguous().view(rows, -1)


def _one_head(cache: Tensor) -> Tensor:
    """A cache of latents as keys of one head."""
    return cache.view(*cache.shape[:2], 1, cache.shape[2])


def _padded(x: Tensor, size: int) -> Tensor:
    """`[rows, heads, features]` as `[rows, heads * size]`, zeros behind each head's features."""
    rows, heads, features = x.shape
    if features < size:
        x = mint.cat([x, mint.zeros((rows, heads, size - features), dtype=x.dtype)], -1)
    return x.contiguous().view(rows, heads * size)
