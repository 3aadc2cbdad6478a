"""Compiling a model's graphs before the first request, by steps of nobody's tokens. **Not run on hardware.**"""

import time
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models.bridge.graph import GraphedCell
from vllm_ms_models.kernels import PagedSequences
from vllm_ms_models.layers.batch import Batch, CacheView

# Rows, and positions in all, of the one sequence of a step of each kind (kernels/ascend/graph/sequences.py).
STEPS = ((1, 2), (2, 2), (2, 3))
NULL_BLOCK = 0  # vLLM keeps nothing in the first block of a cache


def compile_graphs(graphs: GraphedCell, groups: Sequence[Sequence[str]], block_size: int, longest: int) -> float:
    """`groups` are the layers' names by cache group; gives the seconds that it took.

    Besides those of each kind, steps of one row of a sequence that is longer than a window, if `longest` is.
    RuntimeError, with what MindSpore says as its cause, if one cannot be compiled.
    """
    started = time.monotonic()
    windows = {layer.window for layer in graphs.layers if getattr(layer, "window", None) is not None}
    beyond = [(1, window + 1) for window in sorted(windows) if window < longest]
    for rows, length in (*STEPS, *beyond):
        place = graphs.kernels.place
        positions = np.arange(length - rows, length)
        slots = place(Tensor(positions % block_size, ms.int64))  # of the null block
        tables = np.full((1, -(-length // block_size)), NULL_BLOCK)
        starts, lengths, blocks = (Tensor(array, ms.int32) for array in ([0, rows], [length], tables))
        sequences = PagedSequences(starts, lengths, blocks, rows, length)
        caches: dict[str, CacheView] = {}
        for names in groups:
            caches |= dict.fromkeys(names, CacheView(sequences, slots))
        ranks = None if graphs.ranks is None else graphs.places([rows] * graphs.ranks.size)
        places = Tensor(positions, ms.int64)
        batch = Batch(place(places) if graphs.sectioned is None else places, caches, ranks=ranks)
        try:
            ids, embeds, stream = graphs.nothing(rows)
            result = graphs(ids, batch, embeds, stream)
            for each in result if isinstance(result, tuple) else (result,):
                graphs.kernels.fetch(each)
        except Exception as error:
            raise RuntimeError(
                "The model could not be compiled; add --enforce-eager to serve it operator by operator."
            ) from error
    return time.monotonic() - started
