"""Models as compiled graphs in vLLM's engine on a CPU: of stock operators that mean the same (graph_operators.py), in
float32, so that tokens are those of the CPU back end. Nothing here runs on the hardware."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from mindspore import Tensor

from tests.ascend.comparing import in_float32
from tests.ascend.standin import StandIn
from tests.ascend.test_model_tokens import folder_of
from tests.ascend.whole_graphs import StockOperators, uncapped
from tests.checkpoints import checkpoint, random_prompts
from tests.engines import engine, greedy, token_ids
from tests.zoo.family import families
from tests.zoo.models import made
from vllm_ms_models import kernels, registry
from vllm_ms_models.bridge.compiling import COMPILED
from vllm_ms_models.bridge.graph import GraphedCell
from vllm_ms_models.kernels import PagedSequences
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels

LENGTHS = (1, 7, 90, 33, 16)
TOKENS = 24
KINDS = {"decode", "fresh", "mixed"}


class Contiguous:
    """In a graph a part of a tensor is one of its own, not a view."""

    def __init__(self, operators: Any) -> None:
        self.operators = operators

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.operators, name)
        return lambda *given: call(*(x.contiguous() if isinstance(x, Tensor) else x for x in given))


@dataclass(frozen=True)
class Found:
    """Of a run: the graphs there were before the first request, and after the last; and of each step, for each group
    of layers, its kind, their window, the longest sequence's positions, and the most rows of a sequence."""

    before: int
    after: int
    steps: list[tuple[str, int | None, int, int]]

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, *_ in self.steps}


def graphs_give_the_cpus_tokens(
    folder: Any,
    monkeypatch: pytest.MonkeyPatch,
    operators: Any = None,
    compiles: bool = True,
    lengths: Sequence[int] = LENGTHS,
) -> Found:
    """Prompts longer than a step's budget go in parts, beside tokens of others."""
    prompts = random_prompts(lengths)
    with engine(folder, max_num_batched_tokens=48) as llm:
        want = token_ids(greedy(llm, prompts, TOKENS))
    in_float32(monkeypatch)
    monkeypatch.setattr(kernels, "choose", lambda device: AscendGraphKernels(operators or StockOperators()))
    steps: list[tuple[str, int | None, int, int]] = []
    describe = AscendGraphKernels.kind_of

    def noted(self: AscendGraphKernels, batch: PagedSequences, block: int, window: int | None, *heads: int) -> Any:
        described = describe(self, batch, block, window, *heads)
        steps.append((described[0], window, batch.max_seq_len, batch.max_query_len))
        return described

    with engine(folder, max_num_batched_tokens=48, async_scheduling=False) as llm:
        (graphs,) = llm.apply_model(lambda model: model.run)
        assert isinstance(graphs, GraphedCell)
        assert graphs.compiles == compiles
        assert {groups[0][0] for groups in graphs.graphs} == KINDS  # while it starts
        before = len(graphs.graphs)
        monkeypatch.setattr(AscendGraphKernels, "kind_of", noted)
        got = token_ids(greedy(llm, prompts, TOKENS))
        after = len(graphs.graphs)
    assert got == want
    return Found(before, after, steps)


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
    found = graphs_give_the_cpus_tokens(folder_of(family, name), monkeypatch)
    assert found.kinds == KINDS and found.before == found.after


@pytest.mark.slow
def test_experts_that_are_multiplied_one_by_one_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs_give_the_cpus_tokens(folder_of("deepseek_v3", "packed w4a16"), monkeypatch, compiles=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "w8a8 static"),
        ("qwen3_moe", "packed w4a16"),
        ("deepseek_v3", "floats"),
        ("deepseek_v3", "w8a8 dynamic"),
    ],
)
def test_what_is_compiled_makes_calls_as_documented(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same Python, operator by operator, on operators that do what they document and check what they are given."""
    monkeypatch.setattr(GraphedCell, "_make", lambda self, of_layers, groups, *_: self.as_written(of_layers, groups))
    standin = StandIn()
    operators = Contiguous(standin)
    graphs_give_the_cpus_tokens(folder_of(family, name), monkeypatch, operators)
    assert {"paged_attention", "flash_attention", "reshape_and_cache"} <= set(standin.called)


FAMILIES = [name for name, family in families().items() if set(family.architectures) & COMPILED]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first case of the zoo's tests that the operators take."""
    graphs_give_the_cpus_tokens(made(family, next(iter(uncapped(family).values()))).folder, monkeypatch)


def test_all_that_is_compiled_is_tested() -> None:
    """Those that read images by test_graph_image_models.py."""
    assert set().union(*(families()[name].architectures for name in FAMILIES)) == COMPILED - registry.MULTIMODAL


@pytest.mark.slow
def test_windows_are_in_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences longer than the window take the graph with a mask, also in steps of one token each; others do not."""
    found = graphs_give_the_cpus_tokens(checkpoint("mistral", sliding_window=16), monkeypatch, lengths=(1, 7, 12))
    assert found.before == found.after
    assert {window for _, window, *_ in found.steps} == {16}
    one_each = {(kind, longest > 16) for kind, _, longest, rows in found.steps if rows == 1}
    assert one_each == {("decode", False), ("mixed", True)}
