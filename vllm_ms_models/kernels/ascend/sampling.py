"""Choice of tokens on the device, so that only what is chosen of comes to the host. **Not run on hardware.**"""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint


class DeviceSampling:
    """`Sampling` (kernels/sampling.py) by calls of `fused`, the functions of `operators`."""

    def __init__(self, fused: Any) -> None:
        self._ops = fused

    def rows(self, x: Tensor, numbers: Tensor) -> Tensor:
        return self._ops.gather(x, self._ops.to_device(numbers))

    def argmax(self, logits: Tensor) -> Tensor:
        return self._ops.to_host(self._ops.argmax(logits))

    def candidates(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ops = self._ops
        values, ids = ops.sort(logits / ops.to_device(temperature).reshape(-1, 1))
        most = logits.shape[1]
        if top_k is not None:
            last = np.clip(top_k.asnumpy().astype(np.int64), 1, most).reshape(-1, 1) - 1
            values = _where(mint.ge(values, _columns(ops, values, last)), values)
        if top_p is not None:
            probabilities = ops.softmax(values)
            before = ops.cumsum(probabilities) - probabilities
            share = top_p.asnumpy()
            share = np.where(share < 1, share, np.float32(np.inf))  # a sum of all may be rounded to more than 1
            kept = mint.lt(before, ops.to_device(Tensor.from_numpy(share)).reshape(-1, 1))
            kept = mint.logical_or(kept, _first_column(ops, values.shape))  # one at least, whatever p is
            values = _where(kept, values)
        width = int(ops.to_host(_counts(values)).asnumpy().max())
        ids, values = (ops.to_host(mint.narrow(x, 1, 0, width).contiguous()) for x in (ids, values))
        return ids, values


def _columns(ops: Any, x: Tensor, numbers: np.ndarray) -> Tensor:
    """`x[i, numbers[i]]` of each row, `[rows, 1]`."""
    return mint.gather(x, 1, ops.to_device(Tensor.from_numpy(numbers)))


def _first_column(ops: Any, shape: tuple[int, ...]) -> Tensor:
    first = np.zeros((1, shape[1]), np.int32)
    first[:, 0] = 1
    return mint.gt(ops.to_device(Tensor.from_numpy(first)), 0)


def _where(kept: Tensor, values: Tensor) -> Tensor:
    return mint.where(kept, values, Tensor(-np.inf, ms.float32))


def _counts(values: Tensor) -> Tensor:
    """How many of each row are left, int64 `[rows]`."""
    return mint.sum(mint.gt(values, Tensor(-np.inf, ms.float32)).astype(ms.int64), -1)
