"""Kernels in the traces of vLLM's profiler: each call is an event with the kernel's name.

torch's profiler sees torch's operators only. While it runs, the kernels' methods are shadowed, on the object itself, by
ones that record; when it does not, nothing is left of this, so that it costs nothing.
"""

from collections.abc import Callable
from typing import Any

from mindspore import Tensor
from torch.profiler import record_function

from vllm_ms_models.kernels import Kernels, Weight

PREFIX = "ms::"  # of the events' names

_NOT_IN_STEPS = ("load_", "new_", "set_", "settle", "describe", "cache_shape", "latent_cache_shape")
_METHODS = [
    name
    for name, member in vars(Kernels).items()
    if callable(member) and not name.startswith("_") and not name.startswith(_NOT_IN_STEPS)
]


def set_recording(kernels: Kernels, on: bool, shapes: bool = False) -> None:
    """Let every kernel that a step calls be recorded, or stop it; either may be asked for twice.

    With `shapes`, events are named by what the kernel is called with too, e.g. `ms::linear bfloat16[3, 64]
    bfloat16 weight[192, 64]`.
    """
    for name in _METHODS:
        if on and name not in vars(kernels):
            setattr(kernels, name, _recorded(PREFIX + name, getattr(kernels, name), shapes))
        elif not on:
            vars(kernels).pop(name, None)


def _recorded(event: str, kernel: Callable[..., Any], shapes: bool) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        words = [event, *filter(None, map(_described, arguments))] if shapes else [event]
        with record_function(" ".join(words)):
            return kernel(*arguments, **options)

    return call


def _described(value: Any) -> str:
    """A tensor as `float32[3, 64]`, a matrix as `int8 weight[192, 64]`; empty for anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).lower()}{list(value.shape)}"
    if isinstance(value, Weight):
        kind = f"int{value.integers.bits}" if value.integers else str(value.dtype).lower()
        return f"{kind} weight[{value.out_features}, {value.in_features}]"
    return ""
