"""Models as compiled graphs in vLLM's engine on a CPU: of stock operators that mean the same (graph_operators.py), in
float32, so that tokens are those of the CPU back end. Nothing here runs on the hardware."""

from typing import Any

import pytest

from tests.ascend import graph_operators, graph_operators_experts
from tests.ascend.comparing import in_float32
from tests.ascend.test_model_tokens import folder_of
from tests.checkpoints import checkpoint, random_prompts
from tests.engines import engine, greedy, token_ids
from tests.zoo.family import families
from tests.zoo.models import made
from vllm_ms_models import kernels
from vllm_ms_models.bridge.compiling import COMPILED
from vllm_ms_models.bridge.graph import GraphedCell
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels

LENGTHS = (1, 7, 90, 33, 16)
TOKENS = 24
KINDS = {"decode", "fresh", "mixed"}


class StockOperators:
    def __getattr__(self, name: str) -> Any:
        return getattr(graph_operators if hasattr(graph_operators, name) else graph_operators_experts, name)


def graphs_give_the_cpus_tokens(folder: Any, monkeypatch: pytest.MonkeyPatch) -> GraphedCell:
    """Prompts longer than a step's budget go in parts, beside tokens of others."""
    prompts = random_prompts(LENGTHS)
    with engine(folder, max_num_batched_tokens=48) as llm:
        want = token_ids(greedy(llm, prompts, TOKENS))
    in_float32(monkeypatch)
    monkeypatch.setattr(kernels, "choose", lambda device: AscendGraphKernels(StockOperators()))
    with engine(folder, max_num_batched_tokens=48, async_scheduling=False) as llm:
        (graphs,) = llm.apply_model(lambda model: model.run)
        assert isinstance(graphs, GraphedCell)
        assert {groups[0][0] for groups in graphs.graphs} == KINDS  # while it starts
        got = token_ids(greedy(llm, prompts, TOKENS))
    assert got == want
    return graphs


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if (family, name) == ("qwen2", "w8a8 dynamic") else pytest.mark.slow)
        for family, names in {
            "qwen2": ("floats", "w8a8 dynamic", "w8a8 static"),
            "llama": ("packed w4a16", "w8a16"),
            "qwen3_moe": ("floats", "w8a8 dynamic", "w8a8 static"),
            "deepseek_v3": ("floats", "w8a8 dynamic", "w8a8 static"),
        }.items()
        for name in names
    ],
)
def test_formats(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_give_the_cpus_tokens(folder_of(family, name), monkeypatch)
    assert graphs.compiles and len(graphs.graphs) == len(KINDS)


@pytest.mark.slow
def test_experts_that_are_multiplied_one_by_one_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_give_the_cpus_tokens(folder_of("deepseek_v3", "packed w4a16"), monkeypatch)
    assert not graphs.compiles


# Gemma 2's cases with caps are not compiled.
FAMILIES = [name for name, family in families().items() if set(family.architectures) & COMPILED]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first case of the zoo's tests that the operators take."""
    cases = families()[family].cases.values()
    options = next(case for case in cases if case.get("attn_logit_softcapping") is None)
    graphs = graphs_give_the_cpus_tokens(made(family, dict(options)).folder, monkeypatch)
    assert graphs.compiles


def test_all_that_is_compiled_is_tested() -> None:
    assert set().union(*(families()[name].architectures for name in FAMILIES)) == COMPILED


@pytest.mark.slow
def test_windows_are_in_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences longer than the window take the graph with a mask, also in steps of one token each."""
    graphs = graphs_give_the_cpus_tokens(checkpoint("mistral", sliding_window=16), monkeypatch)
    kinds = {kind for groups in graphs.graphs for kind, window, _ in groups if window == 16}
    assert {"mixed"} <= kinds <= KINDS
