"""Low-rank adapters (LoRA, arXiv:2106.09685) as the kernels see them."""

from collections.abc import Sequence
from dataclasses import dataclass

from mindspore import Tensor

from vllm_ms_models.kernels.weight import Weight


@dataclass(frozen=True)
class LowRank:
    """What one adapter adds to the products of one linear: `scales[i] * up_i @ (down_i @ x)` to part i.

    `down` is a matrix of floats whose parts are those of the linear, as large as their ranks (0: that part stays as it
    is). `up` has the linear's own parts, and as many inputs as the largest rank; a part's inputs beyond its rank are
    multiplied by 0. Neither need have the dtype of the linear's weight.
    """

    down: Weight
    up: Weight
    scales: tuple[float, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.down.sizes


@dataclass(frozen=True)
class Addend:
    """What the adapters of a batch add to the products of one linear; from `Kernels.reduce`.

    `rows` is int32 `[tokens]`: which of `adapters` a token has, -1 for none; None among them adds nothing to this
    linear. `reduced` is float32 `[tokens, parts * width]`: `scale_i * down_i @ x` for each part i and, beyond its rank,
    zeros.
    """

    rows: Tensor
    adapters: tuple[LowRank | None, ...]
    reduced: Tensor


def reduced_width(adapters: Sequence[LowRank | None]) -> int:
    """Values of each part in a row of `Addend.reduced`: the largest rank, made even."""
    largest = max((rank for adapter in adapters if adapter for rank in adapter.ranks), default=0)
    return largest + largest % 2
