"""The batch of one step, as models see it."""

from collections.abc import Mapping
from dataclasses import dataclass

from mindspore import Tensor

from vllm_ms_models.kernels import PagedSequences


@dataclass(frozen=True)
class CacheView:
    """How one group of layers finds the batch in its KV cache."""

    sequences: PagedSequences
    slots: Tensor  # int64 [tokens]: where each token's key and value are stored


@dataclass(frozen=True)
class Batch:
    """All that the layers need besides hidden states; an argument of every `construct`.

    `positions` is int64 `[tokens]`. `caches` maps an attention layer's name to its group's view: layers with
    different cache needs (full, sliding window) have different block tables.
    """

    positions: Tensor
    caches: Mapping[str, CacheView]
