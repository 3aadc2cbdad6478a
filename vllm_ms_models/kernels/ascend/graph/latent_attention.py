"""Multi-head latent attention as part of a compiled graph. **Not run on hardware.**

The matrices of all heads are one tensor, `[heads, nope, rank]` of keys and `[heads, value, rank]` of values, so that
one product does all of them. Steps whose sequences have no context are expanded, all others absorbed.
"""

from typing import Any

from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend.caches import HEAD_MULTIPLE
from vllm_ms_models.kernels.ascend.graph import sequences


class GraphLatentAttention:
    """What `AscendGraphKernels` does with latents, by calls of `fused`; a cache is `[blocks, block_size, 1, width]`."""

    def __init__(self, fused: Any) -> None:
        self._ops = fused

    def attend(
        self, query: Tensor, cache: Tensor, pages: Any, keys: Tensor, values: Tensor, scale: float, triangle: Tensor
    ) -> Tensor:
        """`Kernels.mla_prefill`, of a step of any kind."""
        if "tables" not in pages:
            return self._expanded(query, cache, pages, keys, values, scale, triangle)
        heads, nope, rank = keys.shape
        width = cache.shape[3]
        by_head = query.reshape(-1, heads, nope + width - rank)
        latent = self._by_heads(by_head[:, :, :nope], keys, False)
        rows = mint.cat((latent, by_head[:, :, nope:]), -1).reshape(-1, heads * width)
        tables, lengths = pages["tables"], pages["lengths"]
        hidden, counts = sequences.hidden(pages)
        means = self._ops.paged_attention(rows, cache, cache, tables, lengths, hidden, counts, heads, 1, scale, rank)
        result = self._by_heads(means.reshape(-1, heads, rank), values, True)
        return result.reshape(-1, heads * values.shape[1])

    def _by_heads(self, x: Tensor, matrices: Tensor, transposed: bool) -> Tensor:
        """`[tokens, heads, in]` times each head's matrix, `[tokens, heads, out]`."""
        product = self._ops.batch_matmul(mint.permute(x, (1, 0, 2)), matrices, transposed)
        return mint.permute(product, (1, 0, 2))

    def _expanded(
        self, query: Tensor, cache: Tensor, pages: Any, keys: Tensor, values: Tensor, scale: float, triangle: Tensor
    ) -> Tensor:
        heads, nope, rank = keys.shape
        width, value_size = cache.shape[3], values.shape[1]
        rope = width - rank
        size = padded_size(nope + rope, value_size)
        rows = self._ops.gather(cache.reshape(-1, width), pages["slots"])
        latents = rows[:, :rank]
        turned = rows[:, rank:].reshape(-1, 1, rope) * mint.ones((1, heads, 1), dtype=query.dtype)
        key = self._ops.matmul(latents, keys.reshape(-1, rank)).reshape(-1, heads, nope)
        value = self._ops.matmul(latents, values.reshape(-1, rank)).reshape(-1, heads, value_size)
        lengths = pages["lengths"]
        result = self._ops.flash_attention(
            _padded(query.reshape(-1, heads, nope + rope), size),
            _padded(mint.cat((key, turned), -1), size),
            _padded(value, size),
            triangle,
            lengths,
            lengths,
            heads,
            scale,
        )
        return result.reshape(-1, heads, size)[:, :, :value_size].reshape(-1, heads * value_size)


def padded_size(key_size: int, value_size: int) -> int:
    """Of a head for FlashAttentionScore, whose keys and values are of one size."""
    return -(-max(key_size, value_size) // HEAD_MULTIPLE) * HEAD_MULTIPLE


def _padded(x: Tensor, size: int) -> Tensor:
    """`[rows, heads, features]` as `[rows, heads * size]`, zeros behind each head's features."""
    heads, features = x.shape[1], x.shape[2]
    if features < size:
        zeros = x[:, :, :1] * mint.zeros((1, 1, size - features), dtype=x.dtype)
        x = mint.cat((x, zeros), -1)
    return x.reshape(-1, heads * size)
