"""The KV cache of a layer on Ascend: where it keeps what, and writing to it. **Not run on hardware.**

A cache is `[blocks, 2, block_size, kv_heads, width]`, block axis first as the interface asks, with a block's values
behind its keys. The fused operators take keys and values apart, each in one contiguous tensor
`[blocks, block_size, kv_heads, width]`. Both are views of the cache as a row of 2 n such halves of blocks: of all
but the last, in which the keys of block b are number 2b, and of all but the first, in which its values are. So one
table of blocks serves both, and nothing is copied; tables and slots are those of the interface with block numbers
doubled. (Were it to turn out on hardware that an operator does not take a view that begins within a tensor, then the
bridge would have to bind keys and values as two halves, `[2, blocks, ...]`, and give up that a block lies together.)

`width` is the head's size; in a cache of int8 four bytes more, of the float32 scale behind a head's integers. No fused
operator knows such rows: PagedAttention's `antiquant_scale` is one for each channel, or one for each token, whatever
the head. ReshapeAndCache is documented for floats only, and FlashAttentionScore for heads of a multiple of 16. So
caches of int8, and of other heads, are written by `index_put` and read by `plain_attention`.
"""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models.kernels.ascend import dtypes
from vllm_ms_models.kernels.interface import SCALE_BYTES

HEAD_MULTIPLE = 16  # of the features of a head that the fused operators take


def shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, storage: ms.Type | None
) -> tuple[int, int, int, int, int]:
    """`Kernels.cache_shape`."""
    if block_size % 16:
        raise ValueError(f"blocks of {block_size} are not multiples of 16")
    return num_blocks, 2, block_size, num_kv_heads, head_size + (SCALE_BYTES if storage == ms.int8 else 0)


def head_size_of(cache: Tensor) -> int:
    return cache.shape[4] - (SCALE_BYTES if cache.dtype == ms.int8 else 0)


def is_fused(cache: Tensor) -> bool:
    """Whether the fused operators take it."""
    return cache.dtype != ms.int8 and cache.shape[4] % HEAD_MULTIPLE == 0


def half_blocks(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of `cache`, as views that share numbers of blocks: twice those of the cache."""
    blocks, _, *rest = cache.shape
    halves = cache.view(2 * blocks, *rest)
    return mint.narrow(halves, 0, 0, 2 * blocks - 1), mint.narrow(halves, 0, 1, 2 * blocks - 1)


def doubled_slots(slots: Tensor, block_size: int) -> Tensor:
    """Slots in `half_blocks`; those below 0 stay below 0."""
    slots = slots.astype(ms.int32)
    return slots + mint.floor_divide(slots, Tensor([block_size], ms.int32)) * block_size


class Writer:
    """`Kernels.write_kv` by calls of `fused` (the functions of `operators`)."""

    def __init__(self, fused: Any) -> None:
        self._ops = fused
        # A step's slots, the blocks' size, and what is made of these two, the same in all layers: numbers of slots in
        # `half_blocks`; or which of the tokens have a slot, and the rows of these.
        self._doubled: tuple[Tensor, int, Tensor] | None = None
        self._rows: tuple[Tensor, int, Tensor | None, Tensor | None] | None = None

    def write(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        dtypes.check(key)
        if cache.dtype not in (key.dtype, ms.int8):
            raise ValueError(f"the keys are {key.dtype}, the cache is {cache.dtype}")
        if slots.shape[0] != key.shape[0]:
            raise ValueError(f"{slots.shape[0]} slots for {key.shape[0]} tokens")
        if key.shape[0] == 0:
            return
        if is_fused(cache):
            keys, values = half_blocks(cache)
            size = cache.shape[2]
            if self._doubled is None or self._doubled[0] is not slots or self._doubled[1] != size:
                self._doubled = slots, size, doubled_slots(slots, size)
            self._ops.reshape_and_cache(key.contiguous(), value.contiguous(), keys, values, self._doubled[2])
            return
        kept, rows = self._places(slots, cache)
        if rows is None:
            return
        pair = key.contiguous(), value.contiguous()
        if kept is not None:
            pair = self._ops.gather(pair[0], kept), self._ops.gather(pair[1], kept)
        both = mint.cat(pair)
        if cache.dtype == ms.int8:
            both = rounded_rows(both, cache.shape[3])
        self._ops.index_put(cache.view(-1, both.shape[1]), rows, both)

    def _places(self, slots: Tensor, cache: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Tokens whose slot is not below 0 (None: all), and the rows of their keys, then of their values (None: none).

        Rows are counted in the cache as `[blocks * 2 * block_size, ...]`.
        """
        blocks, _, block_size = cache.shape[:3]
        if self._rows is None or self._rows[0] is not slots or self._rows[1] != block_size:
            numbers = self._ops.to_host(slots).asnumpy()
            if numbers.max() >= blocks * block_size:
                raise ValueError(f"a slot lies beyond the last of {blocks} blocks of {block_size}")
            kept = np.flatnonzero(numbers >= 0)
            of_keys = numbers[kept] + numbers[kept] // block_size * block_size
            tokens = self._numbers(kept) if 0 < len(kept) < len(numbers) else None
            rows = self._numbers(np.concatenate((of_keys, of_keys + block_size))) if len(kept) else None
            self._rows = slots, block_size, tokens, rows
        return self._rows[2:]

    def _numbers(self, values: np.ndarray) -> Tensor:
        return self._ops.to_device(Tensor.from_numpy(values.astype(np.int32)))


def rounded_rows(x: Tensor, heads: int) -> Tensor:
    """`[tokens, heads * size]` as int8 `[tokens, heads * (size + SCALE_BYTES)]`, each head with its scale behind it."""
    tokens, features = x.shape
    rows = x.reshape(tokens * heads, features // heads).astype(ms.float32)
    known = mint.isfinite(rows)
    rows = mint.where(known, rows, 0.0)
    largest = mint.amax(mint.abs(rows), -1, True)
    factor = 127.0 / largest
    # 0 where there is no such factor, and where a value is not finite.
    whole = mint.ge(mint.amin(known.astype(ms.float32), -1, True), 1.0)
    factor = mint.where(mint.logical_and(whole, mint.isfinite(factor)), factor, 0.0)
    scales = mint.where(whole, largest / 127.0, float("nan"))
    integers = mint.round(rows * factor).astype(ms.int8)
    return mint.cat([integers, scales.contiguous().view(ms.int8)], -1).reshape(tokens, -1)


def widened(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of int8 `[..., size + SCALE_BYTES]`: the integers in float32 `[..., size]` and the scales `[..., 1]`."""
    size = rows.shape[-1] - SCALE_BYTES
    scales = mint.narrow(rows, -1, size, SCALE_BYTES).contiguous().view(ms.float32)
    return mint.narrow(rows, -1, 0, size).astype(ms.float32), scales
