"""Models that read images, whose decoders are compiled graphs, as test_graph_models.py. Not run on the hardware."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.ascend.comparing import in_float32
from tests.ascend.standin import StandIn
from tests.ascend.whole_graphs import StockOperators
from tests.engines import engine
from tests.multimodal.models import CASES, QWEN_VIDEO, Case, Prompt, check, decided, prompts, video
from tests.multimodal.test_multimodal_float32 import OPTIONS, TOKENS, generate
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE
from vllm_ms_models import kernels, registry
from vllm_ms_models.bridge.compiling import COMPILED
from vllm_ms_models.bridge.graph import GraphedCell
from vllm_ms_models.kernels.ascend import AscendKernels
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels
from vllm_ms_models.llava.model import DECODERS

MODELS = ["llava, CLIP and Llama", "qwen2_5_vl"]


def test_all_are_compiled_and_tested() -> None:
    assert {CASES[name].architecture for name in MODELS} == registry.MULTIMODAL
    assert registry.MULTIMODAL | set(DECODERS.values()) <= COMPILED


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_is_compiled_beside_its_tower(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers: pictures, video, and text in one batch; then all of it from the caches."""
    case = CASES[name]
    given = prompts(case.image)
    if name == "qwen2_5_vl":
        given.append(Prompt(f"Watch {QWEN_VIDEO}this", videos=[video(4, 84, 112, 1)]))
    graphs_give_the_answers(case, given, monkeypatch)


@pytest.mark.slow
def test_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no images are allowed vLLM gives tokens, and does not ask for their embeddings."""
    case = CASES["qwen2_5_vl"]
    given = [prompt for prompt in prompts(case.image) if not prompt.images]
    graphs_give_the_answers(case, given, monkeypatch, limit_mm_per_prompt={"image": 0, "video": 0})


def graphs_give_the_answers(
    case: Case, given: Sequence[Prompt], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    answers = decided(case, case.reference(), given, TOKENS, LEAST_MARGIN)
    in_float32(monkeypatch)
    active = AscendGraphKernels(StockOperators())
    active._beside = AscendKernels(StandIn())  # whose calls are checked
    monkeypatch.setattr(kernels, "choose", lambda device: active)
    with engine(case.folder, async_scheduling=False, max_num_batched_tokens=48, **OPTIONS | options) as llm:
        (graphs,) = llm.apply_model(lambda model: model.run)
        assert isinstance(graphs, GraphedCell) and graphs.compiles
        before = len(graphs.graphs)
        for _ in range(2):
            check(generate(llm, given), answers, LOGPROB_TOLERANCE)
        assert len(graphs.graphs) == before == 3  # all compiled while it started
