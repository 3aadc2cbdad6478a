"""Graphs of whole models on the real operators, which a CPU does not have: MindSpore infers all of a graph first."""

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import mint

from tests.ascend import graph_operators, graph_operators_experts
from tests.ascend.contract import PRIMITIVES, copied, write_rows
from tests.ascend.steps import BLOCK, step_of
from tests.checkpoints import config
from tests.zoo.family import families
from vllm_ms_models import kernels, registry
from vllm_ms_models.bridge.graph import GraphedCell, Takes
from vllm_ms_models.kernels.ascend import operators
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch, CacheView
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.mla import LatentAttention
from vllm_ms_models.quantization.formats import from_config
from vllm_ms_models.quantization.schemes import FromCheckpoint

# Rows, and positions in all, of each sequence; within the windows of the zoo's configs.
STEPS = {"decode": [(1, 7), (1, 14)], "fresh": [(5, 5), (14, 14)], "mixed": [(5, 9), (1, 14)]}

# A CPU lacks the kernel of one of the back end's operators; before kernels are looked for, all has been inferred.
NO_KERNEL = (
    rf"Kernel select failed:[^A-Za-z]*(Unsupported op |Select CPU operator)\[({'|'.join(PRIMITIVES.values())})\]"
)


class StockOperators:
    """Stock operators that a CPU has in a graph, in place of the fused ones: they mean the same, in float32."""

    def __getattr__(self, name: str) -> Any:
        return getattr(graph_operators if hasattr(graph_operators, name) else graph_operators_experts, name)


class WithoutMemory:
    """The real operators, but tensors stay where they are."""

    to_device = staticmethod(copied)
    to_host = staticmethod(copied)
    write_rows = staticmethod(write_rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(operators, name)


def family_config(name: str, options: dict[str, Any]) -> Any:
    """Of this package where transformers has another model's in its place."""
    made = config(name, **options)
    if name not in registry.CONFIGS:
        return made
    module, kind = registry.CONFIGS[name].split(":")
    values = {key: value for key, value in made.to_dict().items() if key not in ("model_type", "architectures")}
    return getattr(import_module(module), kind)(**values)


def uncapped(family: str) -> dict[str, dict[str, Any]]:
    """Those of the zoo's cases that have no soft caps, of which no graph is made; Gemma 2 has them by default."""
    cases = {name: dict(options) for name, options in families()[family].cases.items()}
    configs = {name: family_config(family, options) for name, options in cases.items()}
    return {name: cases[name] for name in cases if getattr(configs[name], "attn_logit_softcapping", None) is None}


def graphs_of(
    architecture: str,
    configuration: Any,
    dtype: Any,
    quantization: Mapping[str, Any] | None = None,
    takes: Takes = "ids",
    **context: Any,
) -> GraphedCell:
    """Those of a model of example weights."""
    kernels.use(AscendGraphKernels(WithoutMemory()))
    if quantization is not None:
        context["quantization"] = FromCheckpoint(from_config(quantization))
    cell = registry.lookup(architecture)(configuration, ModelContext(dtype, 64, **context)).set_train(False)
    parts = [part for _, part in cell.cells_and_names()]
    rng = np.random.default_rng(0)
    slots = [slot for part in parts if hasattr(part, "slots") for slot in part.slots() if not slot.optional]
    for slot in sorted(slots, key=lambda slot: not slot.early):
        shape = slot.part_shape
        slot.load(rng.uniform(-1, 1, shape).astype(np.float32) if slot.example is None else slot.example(shape))
    return graphed(cell, dtype, takes, configuration.hidden_size)


def graphed(cell: Any, dtype: Any, takes: Takes, width: int) -> GraphedCell:
    """Of a model that is loaded, with caches of 8 blocks."""
    active = kernels.get()
    for _, part in cell.cells_and_names():
        if hasattr(part, "finish_loading"):
            part.finish_loading()
        if isinstance(part, Attention):
            part.cache = active.new_cache((8, 2, BLOCK, part.num_kv_heads, part.head_size), dtype)
        elif isinstance(part, LatentAttention):
            part.cache = active.new_cache((8, BLOCK, part.width), dtype)
    graphs = GraphedCell(cell, active, dtype, takes, width)
    graphs.start()
    return graphs


def check_inferred(graphs: GraphedCell, kind: str) -> Counter[str]:
    """That MindSpore infers all of the graph for that kind of steps; gives how often it has each operator."""
    step = step_of(STEPS[kind], np.random.default_rng(0))
    view = CacheView(step.sequences, step.slots)
    positions = step.positions if graphs.sectioned is None else mint.broadcast_to(step.positions, (3, step.tokens))
    batch = Batch(positions, {layer.name: view for layer in graphs.layers})
    ids, *others = graphs.nothing(step.tokens)
    with tempfile.TemporaryDirectory() as folder:
        # MindSpore would rather have MS_DEV_SAVE_GRAPHS, but reads that once, when a process first compiles.
        ms.set_context(save_graphs=1, save_graphs_path=folder)
        try:
            with pytest.raises((RuntimeError, TypeError), match=NO_KERNEL):
                graphs(ids, batch, *others)
        finally:
            ms.set_context(save_graphs=0)
        (compiled,) = Path(folder).rglob("*_backend_pass_*.ir")
        counts = Counter(re.findall(r"(?m)^ +%\d+\(.*?\) = (?:PrimFunc_)?(\w+)\(", compiled.read_text()))
    assert {group[0] for groups in graphs.graphs for group in groups} == {kind}
    # The compiler may leave out what it takes for useless.
    attention = "FlashAttentionScore" if kind == "fresh" else "PagedAttention"
    assert counts["ReshapeAndCache"] == counts[attention] == len(graphs.layers), counts
    return counts
