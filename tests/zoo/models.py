"""Checkpoints of the zoo on disk, each beside the torch model that it stands for."""

import functools
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import _root, checkpoint
from tests.quantization.models import SIZES, written
from tests.quantization.writers import Scheme
from tests.reference import torch_reference
from tests.zoo.family import families


@dataclass(frozen=True)
class Made:
    """A checkpoint as it is published, and one that transformers loads, which may be the same."""

    folder: Path
    source: Path

    def reference(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        return torch_reference.load(self.source, dtype)


def made(name: str, options: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Made:
    """A random model of a family; `options` are those of its config."""
    source = checkpoint(name, seed, dtype, **options)
    return Made(published(name, source), source)


def quantized(name: str, scheme: Scheme) -> tuple[Path, torch.nn.Module]:
    """The first case of a family in `scheme`, and torch doing its arithmetic."""
    family = families()[name]
    first = next(iter(family.cases.values()))
    if family.floats:
        ignored = ["lm_head", *(f"re:.*{end.replace('.', '[.]')}$" for end in family.floats)]
        scheme = replace(scheme, config=dict(scheme.config or {}) | {"ignore": ignored})
    model = written(name, scheme, 0, family.floats, **(dict(first) | _fitting(first)))
    return published(name, model.folder), model.model


def _fitting(options: Any) -> dict[str, Any]:
    return {name: value for name, value in SIZES.items() if name not in options}


@functools.cache
def published(name: str, source: Path) -> Path:
    publish = families()[name].publish
    if publish is None:
        return source
    target = Path(tempfile.mkdtemp(prefix=f"{name}_published_", dir=_root()))
    for path in source.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            shutil.copy(path, target)
    publish(source, target)
    return target
