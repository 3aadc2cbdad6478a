"""How tokens choose experts on Ascend (`Routing`). **Not run on hardware.**

Two operators do it at once, each for its own kind of routing; the others are put together of plain ones, whose order
among equal ranks is theirs.
"""

from functools import lru_cache
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint

from vllm_ms_models.kernels import reference_experts
from vllm_ms_models.kernels.ascend.dense import Dense
from vllm_ms_models.kernels.routing import Routing

_GROUP_LIMIT = 32  # experts in a group of FusedAddTopKDiv
_GROUPS = 8  # which it takes with so many experts or more


def choose(fused: Any, dense: Dense, logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`Kernels.choose_experts`."""
    reference_experts.check_choice(logits, routing, bias)
    if logits.shape[0] == 0:
        return mint.zeros((0, routing.top_k), dtype=ms.int32), mint.zeros((0, routing.top_k), dtype=ms.float32)
    return chosen(fused, dense, logits, routing, bias)


def chosen(fused: Any, dense: Dense, logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`choose` of what fits, for one token at least."""
    experts = logits.shape[1]
    if _by_sigmoid(routing, experts):
        bias = mint.zeros(experts, dtype=ms.float32) if bias is None else dense.constant(bias, ms.float32)
        arguments = routing.groups, routing.top_groups, _counted(routing), routing.top_k, float(routing.scale)
        shares, ids = fused.sigmoid_group_top_k(logits, bias, *arguments)
        return ids, shares
    if routing.scoring == "softmax" and routing.groups == 1 and bias is None:
        shares, ids = fused.softmax_top_k(logits, routing.top_k)
    else:
        scores = mint.softmax(logits, -1) if routing.scoring == "softmax" else mint.sigmoid(logits)
        ranks = scores if bias is None else scores + dense.constant(bias, ms.float32)
        _, ids = fused.top_k(_within_groups(fused, dense, ranks, routing), routing.top_k)
        shares, ids = mint.gather(scores, 1, ids), ids.astype(ms.int32)
    if routing.renormalize:
        shares = shares / (mint.sum(shares, -1, True) + 1e-20)
    return ids, shares * routing.scale


def _by_sigmoid(routing: Routing, experts: int) -> bool:
    """Whether FusedAddTopKDiv takes it: it always makes shares sum to a factor."""
    return (
        routing.scoring == "sigmoid"
        and routing.renormalize
        and experts <= routing.groups * _GROUP_LIMIT
        and (experts < _GROUP_LIMIT or routing.groups == _GROUPS)
        and experts >= routing.groups * _counted(routing)
    )


def _counted(routing: Routing) -> int:
    """Experts of a group that its rank is the sum of."""
    return 1 if routing.group_rank == "max" else 2


@lru_cache
def _numbers(count: int) -> Tensor:
    """The same tensor each time, so that it is placed once."""
    return Tensor(list(range(count)), ms.int64)


def _within_groups(fused: Any, dense: Dense, ranks: Tensor, routing: Routing) -> Tensor:
    """`ranks` that are -inf but in the best groups."""
    if routing.groups == 1:
        return ranks
    experts = ranks.shape[1]
    of_groups = ranks.reshape(-1, experts // routing.groups)
    best, _ = fused.top_k(of_groups, _counted(routing))
    _, taken = fused.top_k(mint.sum(best, -1).reshape(-1, routing.groups), routing.top_groups)
    numbers = dense.constant(_numbers(routing.groups), ms.int64)
    left_out = mint.sum(mint.eq(taken.unsqueeze(-1), numbers).astype(ms.int32), 1) == 0
    return mint.where(left_out.reshape(-1, 1), float("-inf"), of_groups).reshape(-1, experts)
