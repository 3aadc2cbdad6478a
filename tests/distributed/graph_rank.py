"""One process of test_device_graphs.py: a rank of a model as compiled graphs, whose ranks meet by MindSpore's mccl.

Arguments: architecture, the checkpoint's folder, where rank 0 writes its logits. MindSpore's environment variables
(MS_ROLE and others) say which process this is.
"""

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication
from transformers import AutoConfig

from tests.ascend.steps import BLOCK
from tests.ascend.whole_graphs import StockOperators, graphed
from tests.distributed.device_ranks import join
from vllm_ms_models import checkpoint, kernels, registry
from vllm_ms_models.bridge.graph import GraphedCell
from vllm_ms_models.distributed.communication import GraphGroup
from vllm_ms_models.kernels import PagedSequences
from vllm_ms_models.kernels.ascend import dtypes
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels
from vllm_ms_models.layers.batch import Batch, CacheView
from vllm_ms_models.layers.context import ModelContext

PROMPTS = ([7, 1, 8, 2], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4])
# Tokens of each prompt by step: without context, some of both kinds, one each.
STEPS = ((2, 9), (1, 10), (1, 1))


def model(architecture: str, folder: str) -> GraphedCell:
    group = GraphGroup(
        communication.get_rank(), communication.get_group_size(), communication.GlobalComm.WORLD_COMM_GROUP
    )
    context = ModelContext(ms.float32, 64, tensor_parallel=group, expert_parallel=True)
    cell = registry.lookup(architecture)(AutoConfig.from_pretrained(folder), context).set_train(False)
    parts = [part for _, part in cell.cells_and_names()]
    slots = [slot for part in parts if hasattr(part, "slots") for slot in part.slots()]
    checkpoint.load(folder, slots, progress=False)
    return graphed(cell, ms.float32)


def main(architecture: str, folder: str, target: str) -> None:
    if not join():
        return
    dtypes.TAKEN = (ms.float32,)
    kernels.use(AscendGraphKernels(StockOperators()))
    graphs = model(architecture, folder)
    found: list[list[np.ndarray]] = [[] for _ in PROMPTS]
    done = [0] * len(PROMPTS)
    for counts in STEPS:
        logits = graphs.cell.logits(graphs(*step(done, counts, graphs))).asnumpy()
        for rows, part in zip(found, np.split(logits, np.cumsum(counts)[:-1]), strict=True):
            rows.append(part)
        done = [before + count for before, count in zip(done, counts, strict=True)]
    assert {groups[0][0] for groups in graphs.graphs} == {"fresh", "mixed", "decode"}
    if communication.get_rank() == 0:
        np.savez(Path(target), *map(np.concatenate, found))
    print("done", flush=True)


def step(done: list[int], counts: tuple[int, ...], graphs: GraphedCell) -> tuple[Tensor, Batch]:
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
    batch = Batch(Tensor(positions.astype(np.int64)), {layer.name: view for layer in graphs.layers})
    return Tensor(np.array(ids, np.int32)), batch


if __name__ == "__main__":
    main(*sys.argv[1:])
