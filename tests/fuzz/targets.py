"""What is fed hostile input, and how; each input's generator comes from the seed and the input's number."""

import itertools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from random import Random

from tests.fuzz import configs, files, http_bodies, sampling
from tests.fuzz.mutation import Check

BULK = 256
"""Inputs that are given at once to targets that serve many at a time."""

Bulk = Callable[[Sequence[Random]], list[str]]


def _one_by_one(target: Callable[[], AbstractContextManager[Check]]) -> Callable[[], AbstractContextManager[Bulk]]:
    @contextmanager
    def in_bulk() -> Iterator[Bulk]:
        with target() as check:
            yield lambda rngs: [check(rng) for rng in rngs]

    return in_bulk


AT_ONCE: dict[str, Callable[[], AbstractContextManager[Bulk]]] = {
    "sampling": sampling.engine_requests,
    "requests": http_bodies.bodies,
    "prompts": http_bodies.prompts,
}
TARGETS: dict[str, Callable[[], AbstractContextManager[Bulk]]] = {
    "headers": _one_by_one(files.headers),
    "indexes": _one_by_one(files.indexes),
    "quantization": _one_by_one(configs.quantization),
    "rope": _one_by_one(configs.rope),
    **AT_ONCE,
}


@dataclass
class Result:
    """What became of the inputs, by a word each; of a fault, the number of its (first) input and the trace."""

    counts: Counter[str] = field(default_factory=Counter)
    at: int = 0
    fault: str | None = None


def run(name: str, inputs: int, seed: int = 0, first: int = 0) -> Result:
    """Inputs number `first` and on, until all were given or one has shown a fault."""
    result = Result()
    numbers = iter(range(first, first + inputs))
    result.at = first
    try:
        with TARGETS[name]() as check:
            while chosen := list(itertools.islice(numbers, BULK if name in AT_ONCE else 1)):
                result.at = chosen[0]
                result.counts.update(check([Random(f"{name} {seed} {number}") for number in chosen]))
    except Exception:
        result.fault = traceback.format_exc()
    return result
