"""What the readers of quantization descriptions share. No MindSpore here: descriptions are checked before it starts."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vllm_ms_models.checkpoint.errors import CheckpointError, enumerate_names, quote
from vllm_ms_models.quantization.specs import FloatWeight, Spec


class Format(ABC):
    """A checkpoint's description of its quantization, checked."""

    name: str
    """What `--quantization` may say."""

    @abstractmethod
    def spec(self, module: str) -> Spec:
        """How the linear `module` is stored, by its exact name. CheckpointError if the description leaves it open."""


class Renamed(Format):
    """`format` of a checkpoint that may name its modules otherwise: `prefixes` are those of `checkpoint.renamed`.

    A description may use another of these names than the tensors do. A module is in floats if it is by one of them:
    that is where a description says so by name, such as "all linears but these".
    """

    def __init__(self, format: Format, prefixes: Sequence[tuple[str, str]]) -> None:
        self.format = format
        self.name = format.name
        self.prefixes = prefixes

    def spec(self, module: str) -> Spec:
        specs, errors = [], []
        for name in self._names(module):
            try:
                specs.append(self.format.spec(name))
            except CheckpointError as error:
                errors.append(error)
        if not specs:
            raise errors[0]
        return next((spec for spec in specs if isinstance(spec, FloatWeight)), specs[0])

    def _names(self, module: str) -> list[str]:
        """Our own first."""
        names = [module]
        for theirs, own in reversed(self.prefixes):
            names += [theirs + name.removeprefix(own) for name in names if name.startswith(own)]
        return names


class Settings:
    """A dictionary of settings in which everything must be known: one sentence for what is not."""

    def __init__(self, where: str, values: Any, known: Collection[str]) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where} is {quote(values)}, where a dictionary of settings is expected.")
        self.where = where
        self.values = values
        unknown = [str(name) for name, value in values.items() if name not in known and value is not None]
        if unknown:
            raise CheckpointError(
                f"{where} has settings that are not known here: {enumerate_names(unknown)}; the model cannot be "
                "served without knowing what they change."
            )

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def one_of(self, name: str, allowed: Collection[Any], default: Any = None) -> Any:
        """The value of `name`, or an error with those that are supported."""
        value = self.get(name, default)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise self.refusal(name, f"supported: {', '.join(quote(choice) for choice in allowed)}")
        return value

    def absent(self, *names: str) -> None:
        """Error if one of `names` is set (to anything but null, false, or empty)."""
        for name in names:
            if self.get(name):
                raise self.refusal(name, "this is not supported")

    def group_size(self, name: str = "group_size", default: Any = None) -> int:
        """0 for the whole row (-1 in files)."""
        value = self.get(name, default)
        if type(value) is not int or value < -1 or (value % 16 and value != -1):
            raise self.refusal(name, "supported: -1 (a scale for each row) and multiples of 16")
        return max(value, 0)

    def names(self, name: str) -> list[str]:
        """A list of names or patterns; empty if absent."""
        value = self.get(name, [])
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.refusal(name, "a list of names is expected")
        return list(value)

    def refusal(self, name: str, why: str) -> CheckpointError:
        value = quote(self.values.get(name))
        return CheckpointError(f"{self.where} has {name} {value}, which cannot be served here; {why}.")


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # a{9999999999}, ((((...
        raise CheckpointError(f"{where} has {quote(pattern)}, which is not a regular expression ({error}).") from None


def mentions(module: str, name: str) -> bool:
    """Whether `name` is `module` or some of its dot-separated steps: `mlp` or `layers.0` of `layers.0.mlp.up_proj`."""
    return f".{name}." in f".{module}."


def in_block(module: str) -> bool:
    """Whether `module` is part of one of the numbered blocks: not embedding, not head."""
    return any(step.isdecimal() for step in module.split("."))
