"""Which matrices of a model are quantized, and which tensors of the checkpoint they are."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vllm_ms_models.checkpoint.errors import CheckpointError, enumerate_names, quote
from vllm_ms_models.cli.quantize.calibration import Blueprint
from vllm_ms_models.cli.quantize.source import Source


@dataclass(frozen=True)
class Module:
    """A matrix that is quantized: its name and shape (out, in), the tensors it is read from, and its linear.

    `linear` is the name of the first part of the linear, whose input all parts share; `bias` None if it has none.
    """

    name: str
    shape: tuple[int, int]
    weight: str
    bias: str | None
    linear: str


@dataclass(frozen=True)
class Selection:
    """The modules to be quantized, in the model's order, and the names of linears that stay in floats."""

    modules: dict[str, Module]
    ignored: list[str]


def select(plan: Blueprint, source: Source, patterns: Sequence[str], with_head: bool) -> Selection:
    """Every linear but those that `patterns` match, and the head unless `with_head`. Raises ValueError."""
    names = [part.name for linear in plan.observer.linears for part in linear.parts]
    matched = {name for pattern in patterns for name in _matching(pattern, names)}
    if with_head and plan.head is None:
        raise ValueError(f"{source.architecture} has no output head that can be quantized; leave --lm-head out.")
    if with_head and plan.head in matched:
        raise ValueError(f"--ignore leaves {plan.head} in floats, which --lm-head quantizes; leave one of them out.")
    modules: dict[str, Module] = {}
    for linear in plan.observer.linears:
        parts = [part.name for part in linear.parts]
        kept = [name for name in parts if name in matched]
        if kept and len(kept) < len(parts):
            others = ", ".join(name for name in parts if name not in matched)
            raise ValueError(
                f"--ignore leaves {', '.join(kept)} in floats but not {others}, with which it is multiplied at once; "
                "ignore all of them or none."
            )
        if kept or (parts[0] == plan.head and not with_head):
            matched.update(parts)
            continue
        for part in linear.parts:
            weight, bias = f"{part.name}.weight", f"{part.name}.bias"
            if part.name == plan.head and source.tied and plan.embedding is not None:
                weight = plan.embedding
            has_bias = bias in source.checkpoint.tensors and linear.has_bias
            modules[part.name] = Module(part.name, part.shape, weight, bias if has_bias else None, parts[0])
    if not modules:
        raise ValueError("--ignore leaves every linear in floats; nothing is left to be quantized.")
    _require_tensors(modules, source)
    return Selection(modules, [name for name in names if name in matched])


def group_size(selection: Selection, most: int, sizes: Sequence[int]) -> int:
    """The largest of `sizes` not above `most` that divides the inputs of every module. ValueError if none does."""
    for size in sorted(sizes, reverse=True):
        if size <= most and all(module.shape[1] % size == 0 for module in selection.modules.values()):
            return size
    smallest = min(sizes)
    odd = [module.name for module in selection.modules.values() if module.shape[1] % smallest]
    raise ValueError(
        f"The inputs of {enumerate_names(odd)} are no multiple of {smallest}, the smallest group; leave them in floats "
        "with --ignore."
    )


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"--ignore {quote(pattern)} is not a regular expression ({error}).") from None
        found = [name for name in names if expression.match(name)]
    else:
        found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(
            f"--ignore {quote(pattern)} matches no linear of the model; they are called like {enumerate_names(names)}."
        )
    return found


def _require_tensors(modules: dict[str, Module], source: Source) -> None:
    tensors = source.checkpoint.tensors
    if missing := [module.weight for module in modules.values() if module.weight not in tensors]:
        raise CheckpointError(f"{source.folder} lacks {enumerate_names(missing)}; download the model again.")
    for module in modules.values():
        shape = tensors[module.weight].shape
        if shape != module.shape:
            raise CheckpointError(
                f"{quote(module.weight)} of {source.folder} has shape {list(shape)} where {list(module.shape)} is "
                "expected; check that config.json belongs to these weights."
            )
