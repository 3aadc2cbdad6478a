"""The check of the operators for real hardware: its own meaning of each, and what it makes of faults.

What it says on hardware was not seen. Here the operators are those of the stand-in, whose meaning was written apart.
"""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from tests.ascend.contract import array_of
from tests.ascend.standin import StandIn
from vllm_ms_models.kernels.ascend.selfcheck import runs
from vllm_ms_models.kernels.ascend.selfcheck.cases import Result
from vllm_ms_models.kernels.ascend.selfcheck.process import Line

CASES = runs.load()
ATTENTION = [case for case in CASES if case.operator.endswith("attention")]  # averages: small beside their terms


def test_operators_without_a_case_are_named() -> None:
    names = runs.unchecked([case for case in CASES if case.operator != "matmul"])
    assert "matmul" in names and not {"gather", "memory", "to_device", "lru_cache"} & {*names}


def checks(cases: list[Any]) -> Any:
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [pytest.param(case, dtype, id=f"{case.name} {dtype}") for case in cases for dtype in case.dtypes],
    )


@checks(CASES)
def test_operators_that_do_what_they_mean_pass(case: Any, dtype: Any) -> None:
    status, detail = runs.outcome(case, dtype, StandIn())
    assert status == runs.OK, detail


class Faulty:
    """The stand-in, with one number of each result off by 16 roundings of the largest, and of integers by 4."""

    def __init__(self) -> None:
        self.sound = StandIn()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            results = getattr(self.sound, name)(*arguments)
            if name in ("to_device", "to_host"):
                return results
            written = {"reshape_and_cache": slice(2, 3), "write_rows": slice(0, 1), "index_put": slice(0, 1)}.get(
                name, slice(0, 0)
            )
            found = results if isinstance(results, tuple) else (*arguments[written],) if results is None else (results,)
            for tensor in found:
                values = array_of(tensor)
                at = np.unravel_index(np.argmax(np.abs(values.astype(np.float32))), values.shape)
                step = {ms.float16: 2.0**-7, ms.bfloat16: 2.0**-4}.get(tensor.dtype, 2.0**-14)
                values[at] = (
                    values[at] - 4 * np.sign(values[at]) if tensor.dtype == ms.int8 else values[at] * (1 - step)
                )
            return results

        return call


@checks([case for case in CASES if case not in ATTENTION])
def test_operators_that_are_a_little_wrong_do_not(case: Any, dtype: Any) -> None:
    assert runs.outcome(case, dtype, Faulty())[0] == runs.DIFFERS


@checks(ATTENTION)
@pytest.mark.parametrize("fault", ["scale", "length", "table"])
def test_attention_to_other_positions_does_not_pass(case: Any, dtype: Any, fault: str) -> None:
    class Other:
        def __init__(self) -> None:
            self.sound = StandIn()
            self.to_device, self.to_host = self.sound.to_device, self.sound.to_host

        def paged_attention(self, *arguments: Any) -> Tensor:
            changed = list(arguments)
            if fault == "scale":
                changed[9] = 1.3 * arguments[9]
            elif fault == "length":
                changed[4] = arguments[4] - 1
            else:
                changed[3] = Tensor(arguments[3].asnumpy()[:, ::-1].copy())
            return self.sound.meaning.paged_attention(*changed)

        def flash_attention(self, *arguments: Any) -> Tensor:
            changed = list(arguments)
            if fault == "scale":
                changed[7] = 1.3 * arguments[7]
            elif fault == "length":
                changed[4] = changed[5] = Tensor(np.array([6, 149], np.int32))
            else:
                changed[1] = Tensor.from_numpy(array_of(arguments[1])[::-1].copy())
            return self.sound.meaning.flash_attention(*changed)

    assert runs.outcome(case, dtype, Other())[0] == runs.DIFFERS


def test_results_that_are_no_numbers() -> None:
    nan = Tensor(np.array([1, np.nan], np.float32))
    assert Result(nan, np.array([1.0, 1.0])).roundings(StandIn()) == float("inf")
    assert Result(Tensor(np.ones(2, np.float32)), np.ones(3)).roundings(StandIn()) == float("inf")
    assert Result(Tensor(np.array([1 + 2**-10], np.float16)), np.ones(1)).roundings(StandIn()) == 2


class Script:
    """A process that answers what it is told to, and then, if asked again, why it does not."""

    def __init__(self, *answers: Line | str) -> None:
        self.answers = list(answers)

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answer(self, seconds: float) -> Line | str:
        return self.answers.pop(0) if self.answers else "the process ended with -11: "


def test_after_a_fault_another_process_goes_on() -> None:
    a, b, c, d = (Line(name, "float16", planned=4) for name in "abcd")
    started: list[int] = []

    def done(line: Line, status: str) -> Line:
        return Line(line.name, line.dtype, status, planned=4)

    def start(first: int) -> Any:
        started.append(first)
        scripts: dict[int, list[Line | str]] = {
            0: [a, done(a, "ok"), b],  # and then it dies
            2: [c, done(c, "error")],  # what failed says so itself
            3: [d, "no answer within 5 s"],
        }
        return Script(*scripts[first])

    found: Iterator[Line] = runs.checks(start, 5)
    assert [(line.name, line.status, line.detail) for line in found] == [
        ("a", "ok", ""),
        ("b", "error", "the process ended with -11: "),
        ("c", "error", ""),
        ("d", "error", "no answer within 5 s"),
    ]
    assert started == [0, 2, 3]


def test_a_process_that_does_not_start_is_one_fault() -> None:
    (line,) = runs.checks(lambda first: Script(), 5)  # type: ignore[arg-type, return-value]
    assert (line.name, line.status) == ("start of the process", "error")


def test_the_command_on_a_cpu() -> None:
    """It runs the operators that a CPU has, and says of the others that they are not there."""
    command = [sys.executable, "-m", "vllm_ms_models.kernels.ascend.selfcheck", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout + run.stderr
    *lines, total = run.stdout.splitlines()
    assert len(lines) == sum(len(case.dtypes) for case in CASES) + len(runs.unchecked(CASES)) and total.startswith(
        "on cpu: "
    )
    assert "not on this device  paged_attention (decoding), bfloat16" in lines
    assert any(line.startswith("ok                  matmul, float16: off by ") for line in lines)
    assert {line[:20].strip() for line in lines} - {runs.UNCHECKED} == {"ok", "not on this device"}


def test_the_command_where_there_is_no_ascend() -> None:
    command = [sys.executable, "-m", "vllm_ms_models.kernels.ascend.selfcheck", "--device", "ascend", "--only", "relu"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 1
    assert "error" in run.stdout and "on ascend: 1 error" in run.stdout
