"""What the operators of mixtures of experts mean, in stock operators within a graph; see graph_operators.py."""

from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from tests.ascend.graph_operators import gather, numbers, stretches, widened


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = ops.TopK(sorted=True)(x, k)
    return values, ids.astype(ms.int64)


def softmax_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return ops.TopK(sorted=True)(ops.Softmax(-1)(logits), k)


def sigmoid_group_top_k(
    logits: Tensor, bias: Tensor, groups: int, top_groups: int, of_group: int, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    experts = logits.shape[1]
    scores = ops.sigmoid(logits)
    ranks = (scores + bias).reshape(-1, groups, experts // groups)
    of_groups = ops.ReduceSum()(ops.TopK(sorted=True)(ranks, of_group)[0], (-1,))
    least = ops.TopK(sorted=True)(of_groups, top_groups)[0][:, top_groups - 1 : top_groups]
    kept = ops.broadcast_to((of_groups >= least).reshape(-1, groups, 1), ranks.shape)
    ids = ops.TopK(sorted=True)(ops.select(kept, ranks, ops.full_like(ranks, -1e30)).reshape(-1, experts), k)[1]
    shares = ops.gather_elements(scores, 1, ids)
    return shares / ops.ReduceSum(True)(shares, (-1,)) * scale, ids


def ascending(x: Tensor) -> Tensor:
    return ops.Sort()(x.astype(ms.float32))[0].astype(ms.int32)


def fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return ops.select(ops.broadcast_to(mask, x.shape), ops.full_like(x, value), x)


def route(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    choices = ids.reshape(-1).astype(ms.float32)
    count, k = choices.shape[0], ids.shape[1]
    places_of = numbers(choices)
    order = ops.Sort()(choices * count + places_of)[1]  # by expert, then by token
    places = ops.Sort()(order.astype(ms.float32))[1]
    tokens = ((order.astype(ms.float32) + 0.5) / k).astype(ms.int32)
    each = numbers(ops.ones(experts, ms.float32)).reshape(1, -1)
    counts = ops.ReduceSum()((choices.reshape(-1, 1) == each).astype(ms.float32), (0,))
    return gather(x, tokens), places, counts.astype(ms.int32)


def _each(x: Tensor, matrices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows times their experts' matrices `[experts, in, out]`, and their experts; those beyond are any's."""
    experts = stretches(numbers(x[:, 0]), counts)
    experts = ops.minimum(experts, ops.full_like(experts, matrices.shape[0] - 1))
    rows = x.reshape(-1, 1, x.shape[1])
    return ops.BatchMatMul()(rows, gather(matrices, experts).astype(ms.float32)).reshape(-1, matrices.shape[2]), experts


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, bias: Any) -> Tensor:
    product, experts = _each(x, weight, counts)
    return product if bias is None else product + gather(bias, experts)


def grouped_weight_quant_matmul(
    x: Tensor, weight: Tensor, counts: Tensor, scale: Tensor, offset: Any, bias: Any
) -> Tensor:
    experts, inputs, _ = weight.shape
    size = inputs if scale.ndim == 2 else inputs // scale.shape[1]
    matrices: tuple[Tensor, ...] = ()
    for i in range(experts):
        matrices = (*matrices, widened(weight[i], scale[i], None if offset is None else offset[i], size))
    return grouped_matmul(x, ops.stack(matrices), counts, bias)


def grouped_quant_matmul(
    x: Tensor, weight: Tensor, counts: Tensor, scale: Tensor, bias: Tensor, token_scales: Any, dtype: Any
) -> Tensor:
    product, experts = _each(x.astype(ms.float32), weight, counts)
    product = (product + gather(bias, experts).astype(ms.float32)) * gather(scale, experts)
    return product if token_scales is None else product * token_scales.reshape(-1, 1)


def unpermute(x: Tensor, places: Tensor, shares: Tensor) -> Tensor:
    k, features = shares.shape[1], x.shape[1]
    rows = gather(x, places).reshape(-1, k, features)
    return ops.ReduceSum()(rows * shares.reshape(-1, k, 1), (1,))
