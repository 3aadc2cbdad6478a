"""Running the checks: on a device, one after the other, and by processes that are started again after a fault.

After a fault on a device, what follows in that process would fail as well; so the next check has a new one.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from inspect import isfunction
from typing import TYPE_CHECKING, Any

from vllm_ms_models.kernels.ascend.selfcheck.process import Line, Process

if TYPE_CHECKING:
    from vllm_ms_models.kernels.ascend.selfcheck.cases import Case

ALLOWED = 4.0  # roundings: an operator may round products of its inputs, their factors, their sum, and its result
OK, DIFFERS, ERROR, ABSENT, UNCHECKED = "ok", "differs", "error", "not on this device", "has no check yet"
BAD = {DIFFERS, ERROR}
# What MindSpore says of a CPU that lacks a kernel, lacks it in a dtype, or has none for a part of a tensor.
NO_KERNEL = re.compile(
    r"The kernel \w+ unregistered|Create kernelmod for op \w+ failed|Select CPU operator\[\w+\]|"
    r"Unsupported op \[\w+\] on CPU|an unexpected kernel has been launched"
)


def checks(start: Callable[[int], Process], seconds: float) -> Iterator[Line]:
    """One line for each operator and dtype, as they come. `start(n)` makes the process that begins with number n."""
    done, planned = 0, 1
    while done < planned:
        current = Line("start of the process", "any dtype")
        with start(done) as process:
            while done < planned:
                answer = process.answer(seconds)
                if isinstance(answer, str):
                    if not current.status:
                        yield replace(current, status=ERROR, detail=answer)
                        done += 1
                    break
                current, planned = answer, answer.planned
                if current.status:
                    yield current
                    done += 1


def load() -> list["Case"]:
    """All checks, simple operators first. Imports MindSpore."""
    for part in ("dense", "attention", "integers", "experts", "sampling"):
        import_module(f"{__package__}.{part}")  # they register theirs
    from vllm_ms_models.kernels.ascend.selfcheck.cases import CASES

    return CASES


def run(device: str, only: str, first: int) -> None:
    """In the process of their own: the checks from number `first` on, until one fails, each announced before."""
    import mindspore as ms

    from vllm_ms_models import compat
    from vllm_ms_models.kernels.ascend import operators

    try:
        ms.set_device("Ascend" if device == "ascend" else "CPU")
        ms.runtime.launch_blocking()  # an error is that of the operator it comes from
        compat.absorb_numpy_warning()
    except (RuntimeError, ValueError) as error:
        Line("start of the process", "any dtype", ERROR, in_words(error)).say()
        return
    cases = load()
    planned = [(case, dtype) for case in cases if only in case.name for dtype in case.dtypes]
    without = [name for name in unchecked(cases) if only in name]
    every = len(planned) + len(without)
    if not every:
        Line(f"no operator with {only} in its name", "any dtype", ERROR).say()
    fused = OnCpu() if device == "cpu" else operators
    for case, dtype in planned[first:]:
        announced = Line(case.name, str(dtype).lower(), planned=every)
        announced.say()
        status, detail = outcome(case, dtype, fused)
        replace(announced, status=status, detail=detail).say()
        if status == ERROR:
            return
    for name in without[max(0, first - len(planned)) :]:
        Line(name, "any dtype", UNCHECKED, planned=every).say()


def unchecked(cases: list["Case"]) -> list[str]:
    """Operators that no case is for; moving tensors is part of each."""
    from vllm_ms_models.kernels.ascend import operators

    names = {name for name, of in vars(operators).items() if isfunction(of) and of.__module__ == operators.__name__}
    known = {case.operator for case in cases} | {"to_device", "to_host", "memory"}
    return sorted(name for name in names - known if not name.startswith("_"))


class OnCpu:
    """`operators` on a CPU, where nothing is moved."""

    def __getattr__(self, name: str) -> Any:
        from vllm_ms_models.kernels.ascend import operators

        return (lambda x: x) if name in ("to_device", "to_host") else getattr(operators, name)


def outcome(case: "Case", dtype: object, fused: Any) -> tuple[str, str]:
    """The status of one check of `fused`, the functions of `operators`, and in words how it went."""
    import numpy as np

    from vllm_ms_models.kernels.ascend.selfcheck.cases import Given

    on_cpu = isinstance(fused, OnCpu)
    if on_cpu and not case.on_cpu:
        return ABSENT, ""
    try:
        results = case.run(Given(fused, dtype, np.random.default_rng(0)))
        roundings = max(result.roundings(fused) for result in results)
    except Exception as error:  # whatever an operator raises is what this is about
        said = in_words(error)
        return (ABSENT, "") if on_cpu and NO_KERNEL.search(said) else (ERROR, said)
    return (OK if roundings <= ALLOWED else DIFFERS), f"off by {roundings:.2g} roundings, {ALLOWED:g} allowed"


def in_words(error: Exception) -> str:
    """On one line and no longer than a report needs; MindSpore adds where in its sources an error comes from."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
