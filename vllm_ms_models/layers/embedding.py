"""Token embeddings and the output head, split over ranks by vocabulary rows."""

from collections.abc import Iterator

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.slots import Slot, pieces
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.scale import Scale
from vllm_ms_models.quantization.base import Part


def vocabulary_rows(vocab_size: int, group: Group) -> tuple[slice, int]:
    """This rank's rows of a vocabulary matrix and how many it stores: equal on all ranks, padded at the end."""
    stored = -(-vocab_size // group.size)
    first = min(group.rank * stored, vocab_size)
    return slice(first, min(first + stored, vocab_size)), stored


class VocabParallelEmbedding(Layer):
    """Token ids `[tokens]` -> hidden states `[tokens, hidden]`, times `scale`, rounded to their dtype first."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, context: ModelContext, scale: float = 1.0) -> None:
        super().__init__()
        rounded = float(Tensor(scale, context.dtype).astype(ms.float32).asnumpy())
        self.scale = None if scale == 1.0 else Scale(rounded, hidden_size)
        self.name = f"{name}.weight"
        self.shape = (vocab_size, hidden_size)
        self.group = context.tensor_parallel
        self.rows, stored = vocabulary_rows(vocab_size, self.group)
        self.first_row = self.rows.start
        self.kernels = kernels.get()
        self.weight = self.kernels.new_weight([stored], hidden_size, context.dtype)

    def slots(self) -> Iterator[Slot]:
        for first, rows in pieces(self.rows, self.shape[1]):

            def load(source: np.ndarray, first: int = first) -> None:
                self.kernels.load_rows(self.weight, 0, first, source)

            yield Slot(self.name, self.shape, load, (rows,))

    def construct(self, ids: Tensor) -> Tensor:
        hidden = self.group.all_reduce(self.kernels.embedding(ids, self.weight, self.first_row))
        return hidden if self.scale is None else self.scale(hidden)


class LearnedEmbedding(Layer):
    """Numbers `[tokens]` -> rows `[tokens, hidden]` of a small table, whole on every rank: positions, token types.

    The table is `[size, hidden]` in the checkpoint; number 0 has row `first`, those before it are not read. A number
    beyond the last row gives zeros.
    """

    def __init__(self, name: str, size: int, hidden_size: int, dtype: ms.Type, first: int = 0) -> None:
        super().__init__()
        self.name = f"{name}.weight"
        self.shape = (size, hidden_size)
        self.rows = slice(first, size)
        self.kernels = kernels.get()
        self.weight = self.kernels.new_weight([size - first], hidden_size, dtype)

    def slots(self) -> Iterator[Slot]:
        for first, rows in pieces(self.rows, self.shape[1]):

            def load(source: np.ndarray, first: int = first) -> None:
                self.kernels.load_rows(self.weight, 0, first, source)

            yield Slot(self.name, self.shape, load, (rows,))

    def construct(self, numbers: Tensor) -> Tensor:
        return self.kernels.embedding(numbers, self.weight)


class ParallelLMHead(Layer):
    """Hidden states `[rows, hidden]` -> float32 logits `[rows, vocab]`.

    With `tied_to`, it multiplies by the embedding's own matrix and reads nothing from the checkpoint.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        context: ModelContext,
        tied_to: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.group = context.tensor_parallel
        self.vocab_size = vocab_size
        rows, self.stored = vocabulary_rows(vocab_size, self.group)
        self.kernels = kernels.get()
        self.tied_weight = None if tied_to is None else tied_to.weight
        self.scheme = None
        if tied_to is None:
            part = Part(name, (vocab_size, hidden_size), rows, slice(0, hidden_size))
            self.scheme = context.quantization.linear([part], False, context.dtype)

    def slots(self) -> Iterator[Slot]:
        if self.scheme is not None:
            yield from self.scheme.slots()

    def finish_loading(self) -> None:
        if self.scheme is not None:
            self.scheme.finish()

    def construct(self, hidden: Tensor) -> Tensor:
        if self.scheme is not None:
            logits = self.scheme.multiply(hidden, ms.float32)
        else:
            assert self.tied_weight is not None
            logits = self.kernels.linear(hidden, self.tied_weight, dtype=ms.float32)
        return logits if self.group.size == 1 else self._gather(logits)

    def _gather(self, logits: Tensor) -> Tensor:
        """The logits of all ranks, which exchange equally many and drop what is beyond the vocabulary."""
        rows, columns = logits.shape
        if rows == 0:
            return mint.empty((0, self.vocab_size), dtype=logits.dtype)
        if missing := self.stored - columns:
            logits = ops.pad(logits, (0, missing))
        gathered = self.group.all_gather(logits)
        if gathered.shape[1] == self.vocab_size:
            return gathered
        return gathered[:, : self.vocab_size].contiguous()
