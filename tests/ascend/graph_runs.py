"""A few steps of a checkpoint as compiled graphs of stock operators: the logits of two prompts."""

from collections.abc import Iterable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from transformers import AutoConfig

from tests.ascend.steps import BLOCK
from tests.ascend.whole_graphs import StockOperators, graphed
from tests.reference.torch_reference import LOGPROB_TOLERANCE, load, logits
from vllm_ms_models import checkpoint, kernels, registry
from vllm_ms_models.bridge.graph import GraphedCell, Takes
from vllm_ms_models.kernels import PagedSequences
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels
from vllm_ms_models.layers.batch import Batch, CacheView
from vllm_ms_models.layers.context import ModelContext

PROMPTS = ([7, 1, 8, 2], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4])
# Tokens of each prompt by step, all in the end: without context, some of both kinds, one each.
STEPS = ((2, 9), (1, 10), (1, 1))


def loaded(architecture: str, folder: str, takes: Takes = "ids", **context: Any) -> GraphedCell:
    """The checkpoint's model, on kernels of its own, which take float32 (`comparing.in_float32`)."""
    kernels.use(AscendGraphKernels(StockOperators()))
    config = AutoConfig.from_pretrained(folder)
    cell = registry.lookup(architecture)(config, ModelContext(ms.float32, 64, **context)).set_train(False)
    parts = [part for _, part in cell.cells_and_names()]
    slots = [slot for part in parts if hasattr(part, "slots") for slot in part.slots()]
    checkpoint.load(folder, slots, ignored=[*getattr(cell, "elsewhere", ())], progress=False)
    return graphed(cell, ms.float32, takes, config.hidden_size)


def logits_of(stages: Sequence[GraphedCell]) -> list[np.ndarray]:
    """Of all tokens of each prompt, float32 `[tokens, vocab]`; a model in one piece is one stage."""
    found: list[list[np.ndarray]] = [[] for _ in PROMPTS]
    done = [0] * len(PROMPTS)
    names = [layer.name for graphs in stages for layer in graphs.layers]
    for counts in STEPS:
        ids, batch = _step(done, counts, names)
        given = stages[0](ids, batch)
        for graphs in stages[1:]:
            given = graphs(None, batch, None, given)
        logits = stages[-1].cell.logits(given).asnumpy()
        for rows, part in zip(found, np.split(logits, np.cumsum(counts)[:-1]), strict=True):
            rows.append(part)
        done = [before + count for before, count in zip(done, counts, strict=True)]
    for graphs in stages:
        assert {groups[0][0] for groups in graphs.graphs} == {"fresh", "mixed", "decode"}
    return [np.concatenate(rows) for rows in found]


def check(found: Iterable[np.ndarray], folder: Any) -> None:
    """Against transformers."""
    model = load(folder)
    for prompt, rows in zip(PROMPTS, found, strict=True):
        assert np.abs(rows - logits(model, prompt).numpy()).max() < LOGPROB_TOLERANCE


def _step(done: list[int], counts: tuple[int, ...], layers: Sequence[str]) -> tuple[Tensor, Batch]:
    """Prompt i has the blocks 2 i and 2 i + 1."""
    new = [range(before, before + count) for before, count in zip(done, counts, strict=True)]
    ids = [prompt[place] for prompt, places in zip(PROMPTS, new, strict=True) for place in places]
    positions = np.concatenate(new)
    slots = np.concatenate([np.array(places) + 2 * number * BLOCK for number, places in enumerate(new)])
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    lengths = np.array([places.stop for places in new], np.int32)
    tables = np.arange(2 * len(PROMPTS), dtype=np.int32).reshape(-1, 2)
    arrays = Tensor(starts), Tensor(lengths), Tensor(tables)
    view = CacheView(PagedSequences(*arrays, max(counts), int(lengths.max())), Tensor(slots.astype(np.int64)))
    return Tensor(np.array(ids, np.int32)), Batch(Tensor(positions.astype(np.int64)), dict.fromkeys(layers, view))
