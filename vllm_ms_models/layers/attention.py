"""Attention over the paged KV cache."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer


class Attention(Layer):
    """Scaled dot-product attention of one layer, with grouped KV heads, sliding window and soft cap.

    `name` is unique and holds the layer's number; under it the cache manager knows the layer. `cache` is bound to it
    before the first batch. `window` counts the tokens a position sees, itself included. Unless it is `causal`, a
    position sees the whole sequence, which must then be in one batch; that is decided before the first one, too.
    """

    def __init__(
        self,
        name: str,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = head_size**-0.5 if scale is None else scale
        self.window = window
        self.soft_cap = soft_cap
        self.kernels = kernels.get()
        self.cache: Tensor | None = None
        self.sinks: Tensor | None = None
        self.causal = True

    def construct(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
        """`[tokens, heads * head_size]` queries, `[tokens, kv_heads * head_size]` keys and values -> as queries."""
        view = batch["caches"][self.name]
        self.kernels.write_kv(key, value, self.cache, view["slots"])
        options = self.scale, self.window, self.soft_cap, self.causal
        return self.kernels.paged_attention(query, self.cache, view["sequences"], *options, sinks=self.sinks)


class SinkAttention(Attention):
    """The same with one more score for each head, which has no value and takes its share of the attention (gpt-oss).

    `sinks` is the name of the tensor of all ranks' heads in the checkpoint.
    """

    def __init__(
        self,
        name: str,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        sinks: str,
        context: ModelContext,
        **options: Any,
    ) -> None:
        super().__init__(name, num_heads, num_kv_heads, head_size, **options)
        self.sinks_name = sinks
        self.group = context.tensor_parallel
        self.sinks = Tensor.from_numpy(np.zeros(num_heads, np.float32))

    def slots(self) -> Iterator[Slot]:
        def load(source: np.ndarray) -> None:
            assert self.sinks is not None
            self.sinks.asnumpy()[...] = source  # shares memory with the tensor

        first, count = self.group.rank * self.num_heads, self.group.size * self.num_heads
        yield Slot(self.sinks_name, (count,), load, (slice(first, first + self.num_heads),), itemsize=4)
