"""What the descriptions of the operators are made of."""

from typing import Any

from mindspore import Tensor

Shape = tuple[tuple[int, ...], Any]  # with the dtype


class ContractError(AssertionError):
    """A call is not what an operator's documentation asks for."""


def ask(condition: bool, what: str) -> None:
    if not condition:
        raise ContractError(what)


def described(argument: Any) -> Any:
    return (tuple(argument.shape), str(argument.dtype)) if isinstance(argument, Tensor) else str(argument)


def like(x: Tensor, width: int | None = None) -> list[Shape]:
    return [((*x.shape[:-1], x.shape[-1] if width is None else width), x.dtype)]


def shaped(x: Tensor, shape: tuple[int, ...], dtype: Any, what: str) -> None:
    ask(tuple(x.shape) == shape and x.dtype == dtype, f"{what}: {described(x)}, not {shape} in {dtype}")


def vector(x: Tensor, size: int, dtype: Any, what: str) -> None:
    shaped(x, (size,), dtype, what)
