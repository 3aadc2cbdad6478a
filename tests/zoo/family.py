"""What the tests of the zoo know of an architecture: small configs that show what is odd about it.

A module in `families/` describes one, as `FAMILY`, under the name that tests/checkpoints.py has for it.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

FAMILIES = Path(__file__).parent / "families"


@dataclass(frozen=True)
class Family:
    """One architecture, or several that are one class here.

    `cases` are at least three configs, by names that say what they show, over the defaults of tests/checkpoints.py; the
    first is tested in more ways. `config` is transformers' class. Where it is another model's, of the same arithmetic,
    because transformers has none for this one, `publish(source, target)` writes its checkpoint as this one's.
    """

    architectures: tuple[str, ...]
    config: Callable[..., PreTrainedConfig]
    cases: Mapping[str, Mapping[str, Any]]
    publish: Callable[[Path, Path], None] | None = None
    # The first case's options that do not fit the larger model of the 16-bit test, and what replaces them.
    in_16_bits: Mapping[str, Any] = field(default_factory=dict)
    tensor_parallel: int = 2
    # Whether its layers are those of another family: then its variants are tested in the long suite only.
    alike: bool = False
    # Ends of the names of linears that no quantizer touches, such as a router.
    floats: tuple[str, ...] = ()


@functools.cache
def families() -> dict[str, Family]:
    """All of them, by name."""
    names = sorted(path.stem for path in FAMILIES.glob("*.py"))
    return {name: importlib.import_module(f"tests.zoo.families.{name}").FAMILY for name in names}
