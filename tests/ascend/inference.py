"""What MindSpore infers of an operator's results when it compiles a graph, and the calls to ask it about."""

from typing import Any

import mindspore as ms
import pytest

from tests.ascend.contract import Contract
from vllm_ms_models.kernels.ascend import operators


def inferred(primitive: Any, arguments: tuple[Any, ...], results: int | None) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of a primitive's results: constants of the graph, so no kernel is asked for.

    `results` is their number; None for a tuple of one.
    """

    def shapes(*inputs: Any) -> Any:
        found = primitive(*inputs)
        return found.shape, found.dtype

    def of_each(*inputs: Any) -> Any:
        found = primitive(*inputs)
        return tuple([(found[i].shape, found[i].dtype) for i in range(results or 1)])

    # A graph takes tuples where the operator takes lists, too.
    arguments = tuple(tuple(each) if isinstance(each, list) else each for each in arguments)
    if results == 1:
        return [ms.jit(shapes)(*arguments)]
    return list(ms.jit(of_each)(*arguments))


class Recorder(Contract):
    """Keeps the primitive and arguments of each call, and what the contract gave for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.made: list[tuple[str, Any, tuple[Any, ...]]] = []
        self.records: list[tuple[str, Any, tuple[Any, ...], Any]] = []
        make = operators._primitive

        def recorded(name: str, primitive: Any) -> Any:
            def call(*inputs: Any) -> Any:
                self.made.append((name, primitive, inputs))
                return primitive(*inputs)

            return call

        def remember(name: str, *arguments: Any, **options: Any) -> Any:
            return recorded(name, make(name, *arguments, **options))

        monkeypatch.setattr(operators, "_primitive", remember)
        for constant, name in (("_RESHAPE_AND_CACHE", "ReshapeAndCache"), ("_INDEX_PUT", "InplaceIndexPut")):
            monkeypatch.setattr(operators, constant, recorded(name, getattr(operators, constant)))

    def _check(self, name: str, arguments: tuple[Any, ...]) -> Any:
        results = super()._check(name, arguments)
        self.records.append((*self.made[-1], results))
        return results


# Results of the operators that have several, and which of them the back end uses.
RESULTS: dict[str, tuple[int | None, tuple[int, ...]]] = {
    "RmsNorm": (2, (0,)),
    "AddRmsNorm": (3, (0, 2)),
    "LayerNormExt": (3, (0,)),
    "ApplyRotaryPosEmb": (2, (0, 1)),
    "FlashAttentionScore": (4, (3,)),
    "DynamicQuantExt": (2, (0, 1)),
    "MoeGatingTopKSoftmax": (3, (0, 1)),
    "FusedAddTopKDiv": (2, (0, 1)),
    "TopkExt": (2, (0, 1)),
    "MoeInitRoutingV2": (4, (0, 1, 2)),
    "SortExt": (2, (0,)),
    "GroupedMatmulV4": (None, (0,)),
}


def compared(recorder: Recorder) -> int:
    """How many calls gave what MindSpore infers; AssertionError for another result."""
    checked = 0
    for name, primitive, arguments, results in recorder.records:
        if results is None:
            continue  # ReshapeAndCache writes, so no graph leaves it out
        count, used = RESULTS.get(name, (1, (0,)))
        found = inferred(primitive, arguments, count)
        want = results if isinstance(results, tuple) else (results,)
        assert [found[i] for i in used] == [(tuple(x.shape), x.dtype) for x in want], name
        checked += 1
    print(f"\nAscend: shapes of {checked} calls are those inferred")
    return checked
