"""`vllm-ms list`: the architectures that can be served, where they are and how long. Imports no model."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import vllm_ms_models
from vllm_ms_models import registry

PACKAGE = "vllm-ms-models"
DECODER = ("text", "embedding", "classification")
"""What each architecture that generates text does; the others are what vLLM makes of it (docs/pooling.md)."""
MULTIMODAL = ("text", "images")
"""Of which vLLM makes nothing else."""
ENCODER = ("embedding", "classification")
DRAFT = ("draft",)
"""Proposes tokens to another model and is not served by itself (docs/speculation.md)."""


@dataclass(frozen=True)
class Entry:
    """An architecture. `lines` are those of its module, `folder_lines` those of all Python files of its folder.

    `folder` is None, and both numbers 0, where an installed package does not have the module it names.
    """

    architecture: str
    kinds: tuple[str, ...]
    package: str
    version: str
    module: str
    folder: str | None
    lines: int
    folder_lines: int

    @property
    def is_third_party(self) -> bool:
        return self.package != PACKAGE


def entries() -> list[Entry]:
    """Every architecture of the registry: ours by name, then those of other packages, then drafts."""
    ours = [_built_in(name, module) for name, module in sorted(registry.BUILT_IN.items())]
    points = sorted(entry_points(group=registry.ENTRY_POINT_GROUP), key=lambda point: point.name)
    others = [_third_party(point) for point in points if point.name not in registry.BUILT_IN]
    drafts = [_built_in(name, module) for name, module in sorted(registry.DRAFTS.items())]
    return [*ours, *others, *drafts]


def kinds_of(architecture: str) -> tuple[str, ...]:
    """What a built-in architecture does."""
    known = ((registry.DRAFTS, DRAFT), (registry.MULTIMODAL, MULTIMODAL), (registry.ENCODERS, ENCODER))
    return next((kinds for names, kinds in known if architecture in names), DECODER)


def _built_in(architecture: str, module: str) -> Entry:
    return Entry(architecture, kinds_of(architecture), PACKAGE, vllm_ms_models.__version__, module, *_measured(module))


def _third_party(point: EntryPoint) -> Entry:
    package, version = (point.dist.name, point.dist.version) if point.dist is not None else ("unknown", "")
    return Entry(point.name, DECODER, package, version, point.module, *_measured(point.module))


def _measured(module: str) -> tuple[str | None, int, int]:
    """Folder of a module, its lines, and those of its folder. Only the top package is looked for: nothing runs."""
    top, *inner = module.split(".")
    spec = find_spec(top)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if spec is not None and not inner:  # a module of its own, or a package's __init__
        path = Path(spec.origin) if spec.origin else None
        return (str(path.parent), _lines([path]), _lines([path])) if path else (None, 0, 0)
    for place in places:
        stem = Path(place, *inner)
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return str(path.parent), _lines([path]), _lines(path.parent.rglob("*.py"))
    return None, 0, 0


def _lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "list",
        help="the architectures that can be served",
        description="Lists the architectures that can be served, of this package and of others.",
    )
    parser.add_argument("--lines", action="store_true", help="count lines of code: model.py, and its whole folder")
    parser.add_argument("--json", action="store_true", help="everything known, as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    found = entries()
    if options.json:
        print(json.dumps([asdict(entry) for entry in found], indent=2))
    else:
        print(table(found, options.lines))


def table(found: Iterable[Entry], lines: bool) -> str:
    """`found` in columns."""
    rows = [("architecture", "kinds", "folder", "package", "model.py", "folder's lines")]
    for entry in found:
        package = f"{entry.package} {entry.version} (third party)" if entry.is_third_party else entry.package
        numbers = (str(entry.lines), str(entry.folder_lines))
        rows.append((entry.architecture, ", ".join(entry.kinds), entry.folder or "missing", package, *numbers))
    kept = [row if lines else row[:4] for row in rows]
    widths = [max(map(len, column)) for column in zip(*kept, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in kept)
    return "\n".join("  ".join(row).rstrip() for row in padded)
