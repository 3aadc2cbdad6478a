"""Mixtures of experts: ours in the place of mindone's, which add into rows by an operator that no CPU has."""

from typing import Any

from mindspore import Tensor, nn

from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.moe import ExpertNames, MoE, softmax_top_k
from vllm_ms_models.suites import SuiteError
from vllm_ms_models.suites.mindone.noted import NotedLinear

# The names of an expert's projections (gate, up, down), by which the kinds of blocks are known.
KINDS = (ExpertNames(), ExpertNames(gate_proj="w1", up_proj="w3", down_proj="w2"))


class Experts(Layer):
    """Our experts behind the interface of mindone's blocks: `[1, tokens, hidden]` -> the same, and no logits."""

    def __init__(self, inner: MoE) -> None:
        super().__init__()
        self.inner = inner

    def construct(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        rows = hidden_states.contiguous().view(-1, hidden_states.shape[-1])
        return self.inner(rows).view(hidden_states.shape), None


def experts_for(name: str, block: Any, config: Any, context: ModelContext) -> Experts | None:
    """Ours for `block`, a part of a model of mindone that is called `name`; None if it is no mixture of experts.

    SuiteError if it has more than a softmax router and gated experts.
    """
    experts = getattr(block, "experts", None)
    if not isinstance(experts, nn.CellList):
        return None
    linears = {part: cell for part, cell in experts[0].name_cells().items() if isinstance(cell, NotedLinear)}
    known = [kind for kind in KINDS if {kind.gate_proj, kind.up_proj, kind.down_proj} == set(linears)]
    if not known or set(block.name_cells()) != {"gate", "experts"} or any(cell.has_bias for cell in linears.values()):
        raise SuiteError(f"The mixture of experts {name} ({type(block).__name__}) cannot be served from mindone.")
    (kind,) = known
    up = linears[kind.up_proj]
    routing = softmax_top_k(block.top_k, getattr(block, "norm_topk_prob", True))
    return Experts(
        MoE(name, up.in_features, up.out_features, len(experts), routing, config.hidden_act, context, names=kind)
    )
