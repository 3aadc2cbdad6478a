"""What the documentation of the operators asks for that mixtures of experts and packed weights are made of."""

from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import Tensor

from tests.ascend.checks import Shape, ask, like, shaped, vector

PRIMITIVES = {
    "weight_quant_matmul": "WeightQuantBatchMatmul",
    "softmax_top_k": "MoeGatingTopKSoftmax",
    "sigmoid_group_top_k": "FusedAddTopKDiv",
    "top_k": "TopkExt",
    "ascending": "SortExt",
    "fill": "MaskedFill",
    "route": "MoeInitRoutingV2",
    "grouped_matmul": "GroupedMatmulV4",
    "grouped_quant_matmul": "GroupedMatmulV4",
    "grouped_weight_quant_matmul": "GroupedMatmulV4",
    "unpermute": "InnerMoeTokenUnpermute",
}


def _weight_quant(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> list[Shape]:
    inputs, stored = weight.shape
    outputs = stored * (2 if weight.dtype == ms.qint4x2 else 1)
    ask(weight.dtype in (ms.int8, ms.qint4x2) and x.ndim == 2 and x.shape[1] == inputs, "integers that fit")
    ask(max(inputs, outputs) < 1 << 16, "at most 65535 inputs and outputs")
    groups: tuple[int, ...] = ()
    if group_size:
        ask(32 <= group_size < inputs and group_size % 32 == 0, "groups of a multiple of 32, several to a row")
        groups = (-(-inputs // group_size),)
    for factor in (scale, offset):
        if factor is not None:
            shaped(factor, (*groups, outputs), x.dtype, "scale or offset")
    return like(x, outputs)


def _choice(logits: Tensor, k: int, ids: Any = ms.int32) -> list[Shape]:
    ask(logits.ndim == 2 and logits.dtype == ms.float32 and 1 <= k <= logits.shape[1], "k of some experts")
    return [((logits.shape[0], k), ms.float32), ((logits.shape[0], k), ids)]


def _sigmoid_groups(
    logits: Tensor, bias: Tensor, groups: int, top_groups: int, of_group: int, k: int, scale: float
) -> list[Shape]:
    experts = logits.shape[1]
    vector(bias, experts, logits.dtype, "bias")
    ask(experts % groups == 0 and top_groups <= groups, "groups of one size")
    ask(
        groups * of_group <= experts <= 32 * groups and k <= experts // groups * top_groups, "enough experts in a group"
    )
    ask(experts < 32 or groups == 8, "8 groups, of 32 experts or more")
    return _choice(logits, k)


def _route(x: Tensor, ids: Tensor, experts: int) -> list[Shape]:
    tokens, k = ids.shape
    shaped(ids, (x.shape[0], k), ms.int32, "ids")
    numbers = ids.asnumpy()
    ask(bool((0 <= numbers).all() and (numbers < experts).all()), "experts that exist")
    return [((tokens * k, x.shape[1]), x.dtype), ((tokens * k,), ms.int32), ((experts,), ms.int32)]


def _grouped(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> list[Shape]:
    ask(x.dtype == weight.dtype, "rows and matrices alike")
    return _of_experts(x, weight, counts, bias)


def _grouped_weight_quant(
    x: Tensor, weight: Tensor, counts: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None
) -> list[Shape]:
    ask(weight.dtype in (ms.int8, ms.qint4x2), "integers")
    ((shape, dtype),) = _of_experts(x, weight, counts, bias)
    experts, inputs, _ = weight.shape
    if scale.ndim == 3:
        ask(weight.dtype == ms.qint4x2 and offset is None, "groups of 4 bits without zero points only")
        ask(inputs % scale.shape[1] == 0 and inputs // scale.shape[1] % 2 == 0, "groups of one even size")
    for factor in (scale, offset):
        if factor is not None:
            shaped(factor, (experts, *scale.shape[1:-1], shape[1]), x.dtype, "scale or offset")
    return [(shape, dtype)]


def _of_experts(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> list[Shape]:
    ask(x.ndim == 2 and weight.ndim == 3, "rows, and matrices of all experts")
    experts, inputs, outputs = weight.shape
    outputs *= 2 if weight.dtype == ms.qint4x2 else 1
    ask(x.shape[1] == inputs and experts <= 1024, "rows that fit, of at most 1024 experts")
    vector(counts, experts, ms.int64, "counts")
    numbers = counts.asnumpy()
    ask(bool((numbers >= 0).all()) and numbers.sum() <= x.shape[0], "no more rows than there are")
    if bias is not None:
        wanted = {ms.int8: ms.int32, ms.float16: ms.float16}.get(x.dtype, ms.float32)
        shaped(bias, (experts, outputs), wanted, "bias")
    return like(x, outputs)


def _grouped_quant(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    scale: Tensor,
    bias: Tensor,
    token_scales: Tensor | None,
    dtype: Any,
) -> list[Shape]:
    ask(x.dtype == ms.int8, "int8")
    ((shape, _),) = _grouped(x, weight, counts, bias)
    shaped(scale, tuple(bias.shape), ms.bfloat16 if dtype == ms.bfloat16 else ms.float32, "scale")
    if token_scales is not None:
        vector(token_scales, x.shape[0], ms.float32, "scales of tokens")
    return [(shape, dtype)]


def _unpermute(x: Tensor, places: Tensor, shares: Tensor) -> list[Shape]:
    tokens, k = shares.shape
    shaped(shares, (tokens, k), ms.float32, "shares")
    ask(x.shape[0] == tokens * k and k <= 512, "a row for each of at most 512 shares")
    vector(places, tokens * k, ms.int32, "places")
    return [((tokens, x.shape[1]), x.dtype)]


def _fill(x: Tensor, mask: Tensor, value: float) -> list[Shape]:
    shaped(mask, (x.shape[0], 1), ms.bool_, "mask")
    return like(x)


def _ascending(x: Tensor) -> list[Shape]:
    vector(x, x.shape[0], ms.int32, "numbers")
    return like(x)


DOCUMENTED: dict[str, Callable[..., list[Shape]]] = {
    "weight_quant_matmul": _weight_quant,
    "softmax_top_k": _choice,
    "sigmoid_group_top_k": _sigmoid_groups,
    "top_k": lambda x, k: _choice(x, k, ms.int64),
    "ascending": _ascending,
    "fill": _fill,
    "route": _route,
    "grouped_matmul": _grouped,
    "grouped_quant_matmul": _grouped_quant,
    "grouped_weight_quant_matmul": _grouped_weight_quant,
    "unpermute": _unpermute,
}
