"""Mixture of experts against torch's arithmetic in float64: the names, the shares, shared experts, ranks."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.layer_testing import (
    assert_close,
    back_end,  # noqa: F401 (autouse)
    call,
    context,
    load,
    normal,
    on_ranks,
)
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.kernels import Routing
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.moe import ExpertNames, MoE, group_limited, noaux_tc, softmax_top_k
from vllm_ms_models.quantization.base import Float, LinearScheme, Part, Quantization

HIDDEN, SIZE, SHARED, EXPERTS = 40, 24, 36, 8
MIXTRAL = ExpertNames(gate_proj="w1", up_proj="w3", down_proj="w2")
Tensors = dict[str, torch.Tensor]


def tensors(shared: bool = False, bias: bool = False, names: ExpertNames | None = None) -> Tensors:
    names = names or ExpertNames()
    result = {"moe.gate.weight": normal(1, EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        result |= gated(f"moe.experts.{expert}", SIZE, 10 * expert, names)
    if shared:
        result |= gated("moe.shared_experts", SHARED, 1000, ExpertNames())
    if bias:
        result["moe.gate.e_score_correction_bias"] = normal(2, EXPERTS)
    return result


def gated(prefix: str, size: int, seed: int, names: ExpertNames) -> Tensors:
    return {
        f"{prefix}.{names.gate_proj}.weight": normal(seed, size, HIDDEN) * 0.2,
        f"{prefix}.{names.up_proj}.weight": normal(seed + 1, size, HIDDEN) * 0.2,
        f"{prefix}.{names.down_proj}.weight": normal(seed + 2, HIDDEN, size) * 0.2,
    }


def block(x: torch.Tensor, prefix: str, tensors: Tensors, names: ExpertNames) -> torch.Tensor:
    gate, up, down = (
        tensors[f"{prefix}.{name}.weight"].double() for name in (names.gate_proj, names.up_proj, names.down_proj)
    )
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def expected(x: torch.Tensor, tensors: Tensors, scoring: str, top_k: int, scale: float, normed: bool) -> torch.Tensor:
    """One group. Every expert of every token, most of them times zero."""
    names = MIXTRAL if "moe.experts.0.w1.weight" in tensors else ExpertNames()
    x = x.double()
    logits = x @ tensors["moe.gate.weight"].double().T
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    chosen = (scores + tensors.get("moe.gate.e_score_correction_bias", torch.zeros(EXPERTS))).topk(top_k, -1).indices
    shares = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
    shares = (shares / shares.sum(-1, keepdim=True) if normed else shares) * scale
    result = sum(shares[:, [e]] * block(x, f"moe.experts.{e}", tensors, names) for e in range(EXPERTS))
    if "moe.shared_experts.gate_proj.weight" in tensors:
        result = result + block(x, "moe.shared_experts", tensors, ExpertNames())
    assert isinstance(result, torch.Tensor)
    return result


CASES: dict[str, tuple[Routing, str, int, float, bool, dict[str, Any]]] = {
    "softmax": (softmax_top_k(3, False), "softmax", 3, 1.0, False, {}),
    "softmax, made to sum to 1": (softmax_top_k(2, True), "softmax", 2, 1.0, True, {"names": MIXTRAL}),
    "with shared experts": (group_limited(3, 1, 1, 2.5), "softmax", 3, 2.5, False, {"shared_size": SHARED}),
    "with a bias": (
        noaux_tc(4, 1, 1, 2.5, True),
        "sigmoid",
        4,
        2.5,
        True,
        {"shared_size": SHARED, "correction_bias": True},
    ),
}


def made(case: str, context: ModelContext, **options: Any) -> MoE:
    routing, given = CASES[case][0], CASES[case][5]
    return MoE("moe", HIDDEN, SIZE, EXPERTS, routing, "silu", context, **(given | options))


def checkpoint(case: str) -> Tensors:
    given = CASES[case][5]
    return tensors("shared_size" in given, "correction_bias" in given, given.get("names"))


def filled(cell: MoE, checkpoint: Tensors) -> MoE:
    wanted = [slot.name for _, part in cell.cells_and_names() if hasattr(part, "slots") for slot in part.slots()]
    assert sorted(wanted) == sorted(checkpoint)
    for _, part in cell.cells_and_names():
        if hasattr(part, "slots"):
            load(part, {slot.name: checkpoint[slot.name] for slot in part.slots()})
    for _, part in cell.cells_and_names():
        if hasattr(part, "finish_loading"):
            part.finish_loading()
    return cell


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
def test_moe(case: str, tokens: int) -> None:
    weights, x = checkpoint(case), normal(7, tokens, HIDDEN)
    want = expected(x, weights, *CASES[case][1:5])
    got = call(filled(made(case, context()), weights), x)
    assert_close(got, want, torch.full_like(want, 2e-5), torch.float32)  # logits' errors move the shares


@pytest.mark.parametrize("case", CASES)
def test_moe_split_over_ranks(case: str) -> None:
    """Each rank has a part of every expert's intermediate features, the shared ones' too; one sum is all it takes."""
    weights, x = checkpoint(case), normal(7, 5, HIDDEN)
    want = expected(x, weights, *CASES[case][1:5])
    for got in on_ranks(2, lambda group: call(filled(made(case, context(group=group)), weights), x)):
        assert_close(got, want, torch.full_like(want, 2e-5), torch.float32)


@pytest.mark.parametrize("case", ["softmax", "with shared experts"])
def test_experts_divided_among_ranks(case: str) -> None:
    """Expert parallelism: whole experts, of which each of three ranks has two or three."""
    weights, x = checkpoint(case), normal(7, 9, HIDDEN)
    want = expected(x, weights, *CASES[case][1:5])

    def run(group: Group) -> torch.Tensor:
        cell = filled(made(case, context(group=group, expert_parallel=True)), weights)
        assert len(cell.gate_up) == len(cell.owned) in (2, 3)
        result: torch.Tensor = call(cell, x)
        return result

    for got in on_ranks(3, run):
        assert_close(got, want, torch.full_like(want, 4e-5), torch.float32)


def test_fewer_experts_than_ranks() -> None:
    with pytest.raises(ValueError, match="The 8 experts of moe are fewer than the 9 ranks"):
        made("softmax", context(group=Group(0, 9), expert_parallel=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_not_rounded(dtype: torch.dtype) -> None:
    """Two experts whose logits differ by less than 16 bits tell apart are still told apart."""
    weights = checkpoint("softmax")
    weights["moe.gate.weight"] = torch.zeros(EXPERTS, HIDDEN)
    weights["moe.gate.weight"][:, 0] = 8.0
    weights["moe.gate.weight"][5, 1] = 2.0**-8
    cell = filled(made("softmax", context(dtype)), weights)
    ids, _ = call(cell.gate, torch.ones(1, HIDDEN, dtype=dtype))
    assert ids[0, 0] == 5


class Strange(Float):
    """A scheme that does more than multiply."""

    kernel_weight = LinearScheme.kernel_weight


class StrangeQuantization(Quantization):
    def linear(self, parts: Sequence[Part], bias: bool, dtype: Any) -> LinearScheme:
        return Strange(parts, bias, dtype)


def test_schemes_that_do_more_are_refused() -> None:
    plain = context()
    strange = ModelContext(plain.dtype, plain.max_model_len, Group(), StrangeQuantization())
    with pytest.raises(ValueError, match=r"moe.experts.0.gate_proj is stored in a way \(Strange\) .* for experts"):
        filled(made("softmax", strange), checkpoint("softmax"))


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="8 experts in 3 groups"):
        MoE("moe", HIDDEN, SIZE, EXPERTS, group_limited(2, 3, 1, 1.0), "silu", context())
