"""Loading an adapter's matrices (LoRA, arXiv:2106.09685) for one linear: this rank's part of them.

A linear with the rows R and columns C of the checkpoint's matrix (`Part`) needs the columns C of `down`, all of them
ranks by rows, and the rows R of `up`: a row-parallel linear adds its share of `up (down x)` to its summand, and the sum
over the tensor-parallel ranks is that of both.
"""

from collections.abc import Iterator, Sequence

import mindspore as ms
import numpy as np

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.adapter import Factors
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.kernels import LowRank
from vllm_ms_models.quantization.base import Part, outputs_of


class LowRankWeights:
    """The matrices of one adapter for the linear of `parts`; `factors` are None for parts that it leaves alone."""

    def __init__(self, parts: Sequence[Part], factors: Sequence[Factors | None], dtype: ms.Type) -> None:
        self.parts, self.factors = parts, factors
        self.kernels = kernels.get()
        sizes, self.places = outputs_of(parts)
        first = [each for part, each in zip(parts, factors, strict=True) if not part.continues]  # one for each output
        ranks = [each.rank if each else 0 for each in first]
        self.width = max(ranks)
        self.result = LowRank(
            down=self.kernels.new_weight(ranks, parts[0].in_features, dtype),
            up=self.kernels.new_weight(sizes, self.width, dtype),
            scales=tuple(each.scale if each else 0.0 for each in first),
        )

    def slots(self) -> Iterator[Slot]:
        """The adapter's tensors that this rank reads."""
        for part, factors, (output, first) in zip(self.parts, self.factors, self.places, strict=True):
            if factors is None:
                continue
            outputs, inputs = part.shape

            def load_down(source: np.ndarray, output: int = output) -> None:
                self.kernels.load_rows(self.result.down, output, 0, source)

            def load_up(source: np.ndarray, output: int = output, first: int = first) -> None:
                wide = np.zeros((len(source), self.width), source.dtype)
                wide[:, : source.shape[1]] = source
                self.kernels.load_rows(self.result.up, output, first, wide)

            if not part.continues:
                yield Slot(factors.down, (factors.rank, inputs), load_down, (slice(None), part.columns))
            yield Slot(factors.up, (outputs, factors.rank), load_up, (part.rows,))
