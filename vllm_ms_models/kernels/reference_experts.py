"""Mixture of experts in the reference back end: what `Routing` and `Kernels.experts` mean.

Scores are made by MindSpore's operators in float32; NumPy only finds the best ones, by sorting.
"""

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from vllm_ms_models.kernels.interface import Kernels, Weight
from vllm_ms_models.kernels.routing import Routing


def check_choice(logits: Tensor, routing: Routing, bias: Tensor | None) -> None:
    """ValueError for arguments of `Kernels.choose_experts` that do not fit together."""
    if logits.ndim != 2 or logits.dtype != ms.float32:
        raise ValueError(f"logits are float32 [tokens, experts], not {logits.dtype} {logits.shape}")
    experts = logits.shape[1]
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"there are {experts} experts, but the bias has the shape {bias.shape}")
    routing.check(experts)


def choose(logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    check_choice(logits, routing, bias)
    tokens = logits.shape[0]
    if tokens == 0:
        return mint.empty((0, routing.top_k), dtype=ms.int32), mint.empty((0, routing.top_k), dtype=ms.float32)
    if routing.scoring == "softmax":  # the Softmax operator makes 0 of NaN
        powers = ops.exp(logits - ops.amax(logits, -1, True))
        scores = powers / powers.sum(-1, keepdims=True)
    else:
        scores = 1.0 / (ops.exp(-logits) + 1.0)
    ranks = (scores if bias is None else scores + bias).asnumpy().copy()
    if routing.groups > 1:
        grouped = ranks.reshape(tokens, routing.groups, -1)
        best = -np.sort(-grouped, -1)
        group_ranks = best[..., 0] if routing.group_rank == "max" else best[..., 0] + best[..., 1]
        excluded = _descending(group_ranks)[:, routing.top_groups :]
        np.put_along_axis(grouped, excluded[..., None], -np.inf, 1)
    ids = Tensor(_descending(ranks)[:, : routing.top_k].astype(np.int32))
    shares = ops.gather_elements(scores, 1, ids)
    if routing.renormalize:
        shares = shares / (shares.sum(-1, keepdims=True) + 1e-20)
    return ids, shares * routing.scale


def _descending(values: np.ndarray) -> np.ndarray:
    """The order of each row's values from the largest down; equal ones as they come, NaN last."""
    return np.argsort(-values, -1, kind="stable")


def multiply(
    kernels: Kernels,
    x: Tensor,
    gate_up: Sequence[Weight],
    down: Sequence[Weight],
    ids: Tensor,
    shares: Tensor,
    activation: str,
    addend: Tensor | None = None,
    first_expert: int = 0,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """As `Kernels.experts`, in float32; `kernels` multiply."""
    if len(gate_up) != len(down) or ids.shape != shares.shape or ids.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"{len(gate_up)} and {len(down)} weights, ids {ids.shape} and shares {shares.shape} do not fit "
            f"{x.shape[0]} tokens"
        )
    if addend is not None and addend.shape != x.shape:
        raise ValueError(f"the addend is {addend.shape}, x is {x.shape}")
    for bias, weights in ((gate_up_bias, gate_up), (down_bias, down)):
        if bias is not None and any(bias.shape != (len(weights), weight.out_features) for weight in weights):
            raise ValueError(f"the biases are {bias.shape}, of {len(weights)} experts with other outputs")
    total = np.zeros(x.shape, np.float32) if addend is None else addend.astype(ms.float32).asnumpy().copy()
    chosen, factors = ids.asnumpy() - first_expert, shares.asnumpy()
    for expert in np.unique(chosen):
        if not 0 <= expert < len(gate_up):
            continue
        rows, choices = np.nonzero(chosen == expert)
        taken = ops.gather(x.astype(ms.float32), Tensor(rows.astype(np.int32)), 0).astype(x.dtype)
        biases = [None if bias is None else bias[int(expert)].contiguous() for bias in (gate_up_bias, down_bias)]
        gated = kernels.linear_gated(taken, gate_up[expert], activation, biases[0])
        product = kernels.linear(gated, down[expert], biases[1], ms.float32)
        np.add.at(total, rows, (product * Tensor(factors[rows, choices][:, None])).asnumpy())
    return Tensor(total)
