"""What vLLM's profiler records of the kernels, and that nothing is left of it when it does not run."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ascend.standin import StandIn
from tests.checkpoints import checkpoint, random_prompts
from tests.engines import engine, greedy
from vllm_ms_models import kernels
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels
from vllm_ms_models.worker import MindSporeWorker


def recorded(folder: Path) -> list[str]:
    """The names of the kernels' events in the newest trace."""
    newest = max(folder.glob("*.pt.trace.json"), key=lambda file: file.stat().st_mtime)
    names = [str(event.get("name")) for event in json.loads(newest.read_text())["traceEvents"]]
    return [name for name in names if name.startswith("ms::")]


@pytest.mark.parametrize("back_end", ["cpp", "reference"])
def test_kernels_are_recorded_while_the_profiler_runs(back_end: str, tmp_path: Path) -> None:
    profiler: dict[str, Any] = {"profiler": "torch", "torch_profiler_dir": str(tmp_path)}
    profiler |= {"torch_profiler_use_gzip": False, "torch_profiler_with_stack": False}
    profiler |= {"torch_profiler_record_shapes": True}
    prompts = random_prompts([5])
    with engine(checkpoint("llama"), {"VLLM_MS_KERNELS": back_end}, profiler_config=profiler) as llm:
        own = set(vars(kernels.get()))
        llm.start_profile()
        greedy(llm, prompts, 3)
        llm.stop_profile()
        assert set(vars(kernels.get())) == own
        counts = Counter(recorded(tmp_path))
        # Three layers; the prompt's step and two of one token each.
        assert counts["ms::linear float32[5, 96] float32 weight[64, 96]"] == 3
        assert counts["ms::linear float32[1, 96] float32 weight[64, 96]"] == 2 * 3
        assert sum(count for name, count in counts.items() if name.startswith("ms::paged_attention ")) == 3 * 3


def test_a_profiler_that_stops_by_itself(tmp_path: Path) -> None:
    profiler: dict[str, Any] = {"profiler": "torch", "torch_profiler_dir": str(tmp_path), "max_iterations": 2}
    profiler |= {"torch_profiler_use_gzip": False, "torch_profiler_with_stack": False, "delay_iterations": 2}
    with engine(checkpoint("llama"), profiler_config=profiler) as llm:
        own = set(vars(kernels.get()))
        llm.start_profile()
        assert set(vars(kernels.get())) == own  # it waits for two steps first
        greedy(llm, random_prompts([5]), 12)
        assert set(vars(kernels.get())) == own
        assert Counter(recorded(tmp_path))["ms::paged_attention"] == 3 * 2
        llm.stop_profile()


def test_what_runs_beside_graphs_is_recorded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    active = AscendGraphKernels(StandIn())
    monkeypatch.setattr(kernels, "_active", active)
    worker: Any = SimpleNamespace(
        profiler=SimpleNamespace(is_running=True), profiler_config=SimpleNamespace(torch_profiler_record_shapes=False)
    )
    for running in (True, False):
        worker.profiler.is_running = running
        MindSporeWorker._record_kernels(worker)
        for each in (active, active.beside_graphs):
            assert ("linear" in vars(each)) == running
