"""A few steps of a checkpoint as compiled graphs of stock operators: the logits of two prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
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


def logits_of(stages: Sequence[GraphedCell], prompts: slice = slice(None)) -> list[np.ndarray]:
    """Of all tokens of each of these prompts, float32 `[tokens, vocab]`; a model in one piece is one stage."""
    found: list[list[np.ndarray]] = [[] for _ in PROMPTS[prompts]]
    done = [0] * len(PROMPTS)
    for counts in STEPS:
        logits = logits_of_step(stages, done, counts, prompts)
        for rows, part in zip(found, np.split(logits, np.cumsum(counts[prompts])[:-1]), strict=True):
            rows.append(part)
        done = [before + count for before, count in zip(done, counts, strict=True)]
    # The first prompt alone has no step of some tokens with context.
    kinds = {"fresh", "decode"} if len(found) == 1 and prompts.start == 0 else {"fresh", "mixed", "decode"}
    for graphs in stages:
        assert {groups[0][0] for groups in graphs.graphs} == kinds
    return [np.concatenate(rows) for rows in found]


def logits_of_step(
    stages: Sequence[GraphedCell], done: Sequence[int], counts: Sequence[int], prompts: slice
) -> np.ndarray:
    """Of the next `counts` tokens of each prompt, of which `done` are; other prompts are other data-parallel ranks'."""
    ids, batch = _step(done, counts, [layer.name for graphs in stages for layer in graphs.layers], prompts)
    if stages[0].ranks is not None:
        batch = replace(batch, ranks=stages[0].places(counts))
    given = stages[0](ids, batch)
    for graphs in stages[1:]:
        given = graphs(None, batch, None, given)
    return stages[-1].cell.logits(given).asnumpy()


def check(found: Iterable[np.ndarray], folder: Any, prompts: slice = slice(None)) -> None:
    """Against transformers."""
    model = load(folder)
    for prompt, rows in zip(PROMPTS[prompts], found, strict=True):
        assert np.abs(rows - logits(model, prompt).numpy()).max() < LOGPROB_TOLERANCE


def _step(done: Sequence[int], counts: Sequence[int], layers: Sequence[str], prompts: slice) -> tuple[Tensor, Batch]:
    """Prompt i has the blocks 2 i and 2 i + 1."""
    numbers = range(len(PROMPTS))[prompts]
    new = [range(done[i], done[i] + counts[i]) for i in numbers]
    ids = [PROMPTS[i][place] for i, places in zip(numbers, new, strict=True) for place in places]
    positions = np.concatenate(new)
    slots = np.concatenate([np.array(places) + 2 * i * BLOCK for i, places in zip(numbers, new, strict=True)])
    starts = np.cumsum([0, *map(len, new)]).astype(np.int32)
    lengths = np.array([places.stop for places in new], np.int32)
    tables = np.array([[2 * i, 2 * i + 1] for i in numbers], np.int32)
    arrays = Tensor(starts), Tensor(lengths), Tensor(tables)
    view = CacheView(PagedSequences(*arrays, max(map(len, new)), int(lengths.max())), Tensor(slots.astype(np.int64)))
    return Tensor(np.array(ids, np.int32)), Batch(Tensor(positions.astype(np.int64)), dict.fromkeys(layers, view))
