"""Classification heads: from pooled hidden states to one score for each label."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.quantization.base import Float, Part


class ScoreHead(Layer):
    """Hidden states `[rows, hidden]` of `dtype` -> scores `[rows, labels]` of `dtype`, whole on every rank.

    Reads `score.weight`, and `score.bias` where there is one. Never quantized: it is small, and what it gives is the
    model's answer.
    """

    def __init__(self, labels: int, hidden_size: int, dtype: ms.Type, name: str = "score") -> None:
        super().__init__()
        part = Part(name, (labels, hidden_size), slice(0, labels), slice(0, hidden_size))
        self.scheme = Float([part], True, dtype)

    def slots(self) -> Iterator[Slot]:
        bias = [slot.name for slot in self.scheme.bias_slots()]
        for slot in self.scheme.slots():
            yield replace(slot, optional=slot.name in bias)

    def construct(self, hidden: Tensor) -> Tensor:
        return self.scheme.multiply(hidden)


class DenseScoreHead(Layer):
    """As `ScoreHead`, with a dense layer and tanh before it, of `dtype` too; the names are those of both layers."""

    def __init__(self, labels: int, hidden_size: int, dtype: ms.Type, dense: str, name: str) -> None:
        super().__init__()
        self.dense = ScoreHead(hidden_size, hidden_size, dtype, dense)
        self.score = ScoreHead(labels, hidden_size, dtype, name)

    def slots(self) -> Iterator[Slot]:
        yield from self.dense.slots()
        yield from self.score.slots()

    def construct(self, hidden: Tensor) -> Tensor:
        dense = self.dense(hidden).astype(ms.float32)
        # tanh as 2 sigmoid(2x) - 1, as in layers/logits.py: MindSpore's operator is off by 1e-4 on CPU beyond 5.
        return self.score((2.0 / (1.0 + (dense * -2.0).exp()) - 1.0).astype(hidden.dtype))


class TokenScoreHead(Layer):
    """As `ScoreHead`, made of some rows of a language-model head: how likely these tokens are to come next.

    `name` is the tensor `[vocab, hidden]` that the rows are read from, the embedding's if both are the same. With
    `difference`, `tokens` are two, a no and a yes, and there is one score, of which the sigmoid is the softmax of both:
    `softmax([n, y])[1] = sigmoid(y - n)` (Qwen3-Reranker).
    """

    def __init__(
        self, tokens: Sequence[int], difference: bool, name: str, shape: tuple[int, int], dtype: ms.Type
    ) -> None:
        super().__init__()
        self.tokens, self.name, self.shape = tuple(tokens), name, shape
        self.difference = difference
        self.kernels = kernels.get()
        self.rows = np.zeros((len(self.tokens), shape[1]), np.float32)
        labels = 1 if difference else len(self.tokens)
        self.weight = self.kernels.new_weight([labels], shape[1], dtype)

    def slots(self) -> Iterator[Slot]:
        for number, token in enumerate(self.tokens):

            def load(source: np.ndarray, number: int = number) -> None:
                self.rows[number] = source[0]

            yield Slot(self.name, self.shape, load, (slice(token, token + 1),), itemsize=4)

    def finish_loading(self) -> None:
        rows = self.rows[1:] - self.rows[:1] if self.difference else self.rows
        self.kernels.load_rows(self.weight, 0, 0, rows)

    def construct(self, hidden: Tensor) -> Tensor:
        return self.kernels.linear(hidden, self.weight)
