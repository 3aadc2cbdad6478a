"""Mixtures of experts as parts of a compiled graph. **Not run on hardware.**"""

from collections.abc import Callable
from dataclasses import replace

from mindspore import Parameter, Tensor, mint

from vllm_ms_models.kernels.ascend.experts import Experts, Stacked


def kept(stacked: Stacked, whole: bool, keep: Callable[[Tensor], Parameter]) -> Stacked:
    """`stacked` as parameters, which share its memory; `whole`: no other rank has experts."""
    tensors = {name: keep(value) for name, value in vars(stacked).items() if isinstance(value, Tensor)}
    return replace(stacked, whole=whole, **tensors)


class GraphExperts(Experts):
    """Of weights that `kept` made."""

    def part(self, x: Tensor, axis: int, first: int, count: int) -> Tensor:
        return x[first : first + count] if axis == 0 else x[:, first : first + count]

    def foreign(self, rows: Tensor, counts: Tensor, chosen: Tensor) -> Tensor:
        return mint.ge(self._ops.ascending(chosen.reshape(-1)), counts.shape[0]).reshape(-1, 1)
