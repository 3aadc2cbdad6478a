"""Models as compiled graphs: in vLLM's engine on a CPU, and of the real operators up to the kernels that a CPU lacks.

Nothing here runs on the hardware. On the CPU the graphs are made of stock operators that mean the same
(graph_operators.py), in float32, so that tokens are those of the CPU back end.
"""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from transformers import Qwen2Config

from tests.ascend import graph_operators
from tests.ascend.comparing import in_float32
from tests.ascend.contract import copied, write_rows
from tests.ascend.steps import step_of
from tests.checkpoints import checkpoint, random_prompts
from tests.engines import engine, greedy, token_ids
from vllm_ms_models import kernels
from vllm_ms_models.bridge.graph import GraphedCell
from vllm_ms_models.kernels.ascend import operators
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch, CacheView
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.qwen2.model import Qwen2ForCausalLM

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_hidden_layers": 2},
    "llama": {"head_dim": 32, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen3": {"head_dim": 32, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
LENGTHS = (1, 7, 90, 33, 16)
TOKENS = 24
VOCABULARY = 40


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "qwen2" else pytest.mark.slow) for name in FAMILIES]
)
def test_tokens_are_those_of_the_cpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts longer than a step's budget go in parts, beside tokens of others; one graph does all such steps."""
    folder, prompts = checkpoint(family, **FAMILIES[family]), random_prompts(LENGTHS)
    with engine(folder, max_num_batched_tokens=48) as llm:
        want = token_ids(greedy(llm, prompts, TOKENS))
    in_float32(monkeypatch)
    monkeypatch.setattr(kernels, "choose", lambda device: AscendGraphKernels(graph_operators))
    with engine(folder, max_num_batched_tokens=48, async_scheduling=False) as llm:
        got = token_ids(greedy(llm, prompts, TOKENS))
        (graphs,) = llm.apply_model(lambda model: model.run)
    assert got == want
    assert isinstance(graphs, GraphedCell)
    assert set(graphs.graphs) == ({False} if family == "mistral" else {False, True})  # a window needs its mask always


class WithoutMemory:
    """The real operators, but tensors stay where they are."""

    to_device = staticmethod(copied)
    to_host = staticmethod(copied)
    write_rows = staticmethod(write_rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(operators, name)


# Of one of the operators that the graph has.
NO_KERNEL = (
    r"Kernel select failed:[^A-Za-z]*(Unsupported op |Select CPU operator)\[(RmsNorm|AddRmsNorm|Gather|MatMul)\]"
)


@pytest.mark.parametrize("dtype", (ms.float16, ms.bfloat16), ids=str)
@pytest.mark.parametrize("decoding", [True, False])
def test_mindspore_takes_the_whole_graph_of_the_real_operators(dtype: Any, decoding: bool) -> None:
    """All of it is inferred, for tensors of any size; then the first of its kernels is not found on a CPU."""
    kernels.use(AscendGraphKernels(WithoutMemory()))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=VOCABULARY, **heads)
    cell = Qwen2ForCausalLM(config, ModelContext(dtype, 64)).set_train(False)
    attentions = [part for _, part in cell.cells_and_names() if isinstance(part, Attention)]
    for attention in attentions:
        attention.cache = kernels.get().new_cache((8, 2, 16, 2, 16), dtype)
    pairs = [(1, 7), (1, 20)] if decoding else [(5, 5), (1, 20)]
    step = step_of(pairs, np.random.default_rng(0))
    view = CacheView(step.sequences, step.slots)
    batch = Batch(step.positions, {attention.name: view for attention in attentions})
    graphs = GraphedCell(cell, kernels.get(), dtype)
    with pytest.raises((RuntimeError, TypeError), match=NO_KERNEL):
        graphs(Tensor(np.zeros(step.tokens, np.int32)), batch)
