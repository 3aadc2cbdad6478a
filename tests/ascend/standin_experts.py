"""What the operators of mixtures of experts and packed weights mean, in NumPy; see standin.py."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tests.ascend.arrays import array_of, sigmoid, tensor, wide


def best(values: np.ndarray, k: int) -> np.ndarray:
    """The columns of each row's `k` largest values, largest first."""
    return np.argsort(-values, -1, kind="stable")[:, :k]


def int32(values: np.ndarray) -> Tensor:
    return Tensor.from_numpy(np.ascontiguousarray(values.astype(np.int32)))


def integers_of(weight: Tensor) -> np.ndarray:
    """`[..., in, out]` from int8 or two of 4 bits in a byte."""
    values = array_of(weight)
    if weight.dtype != ms.qint4x2:
        return values
    halves = np.stack((values & 15, values >> 4 & 15), -1).reshape(*values.shape[:-1], -1)
    return (halves ^ 8) - 8  # two's complement of 4 bits


def widened(values: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None, size: int) -> np.ndarray:
    """`(values + offsets) * scales` with a row of scales for so many rows of values `[in, out]`."""
    scales = np.repeat(scales, size, 0)[: len(values)]
    if offsets is None:
        return values * scales
    return (values + np.repeat(offsets.reshape(-1, values.shape[1]), size, 0)[: len(values)]) * scales


class ExpertsMeaning:
    """A part of `Meaning`."""

    def weight_quant_matmul(
        self, x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int
    ) -> Tensor:
        values = integers_of(weight)
        scales = wide(scale).reshape(-1, values.shape[1])
        size = group_size or len(values)
        return tensor(wide(x) @ widened(values, scales, None if offset is None else wide(offset), size), x.dtype)

    def softmax_top_k(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        powers = np.exp(wide(logits) - wide(logits).max(-1, keepdims=True))
        shares = powers / powers.sum(-1, keepdims=True)
        ids = best(shares, k)
        return tensor(np.take_along_axis(shares, ids, 1), ms.float32), int32(ids)

    def sigmoid_group_top_k(
        self, logits: Tensor, bias: Tensor, groups: int, top_groups: int, of_group: int, k: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores = sigmoid(wide(logits))
        ranks = (scores + wide(bias)).reshape(len(scores), groups, -1)
        of_groups = np.sort(ranks, -1)[..., -of_group:].sum(-1)
        left_out = best(of_groups, groups)[:, top_groups:]
        np.put_along_axis(ranks, left_out[..., None], -np.inf, 1)
        ids = best(ranks.reshape(scores.shape), k)
        shares = np.take_along_axis(scores, ids, 1)
        return tensor(shares / shares.sum(-1, keepdims=True) * np.float32(scale), ms.float32), int32(ids)

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        ids = best(wide(x), k)
        return tensor(np.take_along_axis(wide(x), ids, 1), ms.float32), Tensor.from_numpy(np.ascontiguousarray(ids))

    def ascending(self, x: Tensor) -> Tensor:
        return int32(np.sort(array_of(x)))

    def fill(self, x: Tensor, mask: Tensor, value: float) -> Tensor:
        return tensor(np.where(mask.asnumpy(), np.float32(value), wide(x)), x.dtype)

    def route(self, x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        flat = array_of(ids).reshape(-1)
        order = np.argsort(flat, kind="stable")
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        rows = Tensor.from_numpy(np.ascontiguousarray(array_of(x)[order // ids.shape[1]]))
        return rows, int32(places), int32(np.bincount(flat, minlength=experts))

    def grouped_matmul(self, x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
        return self._plus(self._each(wide(x), array_of(weight), counts, np.float32), counts, bias, x.dtype)

    def grouped_weight_quant_matmul(
        self, x: Tensor, weight: Tensor, counts: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        experts, inputs, outputs = integers_of(weight).shape
        scales = wide(scale).reshape(experts, -1, outputs)
        offsets = [None] * experts if offset is None else list(wide(offset))
        size = inputs // scales.shape[1]
        matrices = [widened(*each, size) for each in zip(integers_of(weight), scales, offsets, strict=True)]
        return self._plus(self._each(wide(x), np.stack(matrices), counts, np.float32), counts, bias, x.dtype)

    @staticmethod
    def _plus(products: np.ndarray, counts: Tensor, bias: Tensor | None, dtype: Any) -> Tensor:
        for number, rows in enumerate(_ranges(counts)):
            if bias is not None:
                products[rows] += wide(bias)[number]
        return tensor(products, dtype)

    def grouped_quant_matmul(
        self,
        x: Tensor,
        weight: Tensor,
        counts: Tensor,
        scale: Tensor,
        bias: Tensor,
        token_scales: Tensor | None,
        dtype: Any,
    ) -> Tensor:
        sums = self._each(array_of(x).astype(np.float64), array_of(weight), counts, np.float64)  # exact
        for number, rows in enumerate(_ranges(counts)):
            undo = wide(scale)[number] * (np.float32(1) if token_scales is None else wide(token_scales)[rows, None])
            sums[rows] = (sums[rows] + bias.asnumpy()[number]).astype(np.float32) * undo
        return tensor(sums, dtype)

    @staticmethod
    def _each(x: np.ndarray, matrices: np.ndarray, counts: Tensor, dtype: Any) -> np.ndarray:
        """Rows that belong to no expert are NaN: no one may use them."""
        products = np.full((len(x), matrices.shape[2]), np.nan, dtype)
        for matrix, rows in zip(matrices, _ranges(counts), strict=True):
            products[rows] = x[rows] @ matrix.astype(dtype)
        return products

    def unpermute(self, x: Tensor, places: Tensor, shares: Tensor) -> Tensor:
        assert np.array_equal(np.sort(places.asnumpy()), np.arange(len(x))), "every row once"
        rows = wide(x)[places.asnumpy()].reshape(*shares.shape, -1)
        return tensor((rows * wide(shares)[..., None]).sum(1), x.dtype)


def _ranges(counts: Tensor) -> list[slice]:
    numbers = counts.asnumpy()
    ends = np.cumsum(numbers)
    return [slice(int(end - number), int(end)) for number, end in zip(numbers, ends, strict=True)]
