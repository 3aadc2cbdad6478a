"""Batches as a scheduler makes them, on a small paged cache."""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models.kernels import Kernels, PagedSequences, Weight
from vllm_ms_models.kernels.reference_memory import NUMPY

BLOCK = 16
# Name -> (tokens of this step, tokens in all) of each sequence.
STEPS: dict[str, list[tuple[int, int]]] = {
    "empty": [],
    "one token": [(1, 1)],
    "ragged prefill": [(5, 5), (17, 17), (1, 1), (32, 32)],
    "decode": [(1, 7), (1, 33), (1, 16)],
    "mixed with context": [(1, 20), (4, 21), (18, 18), (0, 3)],
}


@dataclass(frozen=True)
class Step:
    """Sequences that own distinct blocks, and the slots of their last tokens."""

    sequences: PagedSequences
    slots: Tensor  # int64 [tokens]
    earlier: Tensor  # int64, of the tokens before
    positions: Tensor  # int64 [tokens]
    blocks: int

    @property
    def tokens(self) -> int:
        return self.slots.shape[0]


def step_of(pairs: list[tuple[int, int]], rng: np.random.Generator) -> Step:
    """Blocks are given in random order; entries of tables that are not used are nonsense."""
    counts = [-(-total // BLOCK) for _, total in pairs]
    blocks = sum(counts) + 2
    numbers = rng.permutation(blocks)
    tables = np.full((len(pairs), max(counts, default=0) + 1), 1 << 30, np.int32)
    new: list[int] = []
    old: list[int] = []
    positions: list[int] = []
    for row, (query, total) in enumerate(pairs):
        mine, numbers = numbers[: counts[row]], numbers[counts[row] :]
        tables[row, : counts[row]] = mine
        slots = [int(mine[p // BLOCK]) * BLOCK + p % BLOCK for p in range(total)]
        old += slots[: total - query]
        new += slots[total - query :]
        positions += range(total - query, total)
    starts = np.concatenate(([0], np.cumsum([query for query, _ in pairs]))).astype(np.int32)
    lengths = np.array([total for _, total in pairs], np.int32)
    queries = max((query for query, _ in pairs), default=0)
    sequences = PagedSequences(Tensor(starts), Tensor(lengths), Tensor(tables), queries, int(lengths.max(initial=0)))
    slots, earlier, places = (Tensor(np.array(x, np.int64)) for x in (new, old, positions))
    return Step(sequences, slots, earlier, places, blocks)


def numpy_of(dtype: ms.Type) -> np.dtype:
    return NUMPY[dtype]


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: ms.Type) -> Tensor:
    return Tensor.from_numpy(rng.normal(size=shape).astype(numpy_of(dtype)))


def weight_of(kernels: Kernels, values: np.ndarray, sizes: list[int], dtype: ms.Type) -> Weight:
    weight = kernels.new_weight(sizes, values.shape[1], dtype)
    for part, rows in enumerate(np.split(values.astype(numpy_of(dtype)), np.cumsum(sizes)[:-1])):
        kernels.load_rows(weight, part, 0, rows)
    return weight
