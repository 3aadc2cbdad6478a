"""The order of things: in each round every engine has its turn while the others are paused."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import limits
from benchmarks.cases import Case
from benchmarks.engines import EngineError, Worker
from benchmarks.processes import sampled_memory, watched

Record = dict[str, Any]


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, list[str]]]:
    """Each round and the order of turns in it: the same cycle, each round starting one later."""
    for number in range(rounds):
        first = number % len(names) if names else 0
        yield number, [*names[first:], *names[:first]]


def time_case(workers: Mapping[str, Worker], case: Case, rounds: int) -> Record:
    """Runs of `case` by all workers, interleaved; an engine that fails is left out of further rounds and named.

    {"case", "limits": one measurement before each turn and one at the end, "runs": [...; "limits": mean of those before
    and after it], "errors": {engine: why}, "peak_bytes": {engine: ...} of the warm-up}
    """
    record: Record = {"case": case.message(), "limits": [], "runs": [], "errors": {}, "peak_bytes": {}}
    errors = record["errors"]
    for name, worker in workers.items():
        with worker.on_turn():
            try:
                with sampled_memory(worker) as memory:
                    worker.ask("prepare", case=case.message())
                record["peak_bytes"][name] = memory["peak_bytes"]
            except EngineError as error:
                errors[name] = str(error)
    measured: list[dict[str, float]] = record["limits"]
    measured.append(limits.measure())
    for number, order in turns(list(workers), rounds * case.repeats):
        for name in order:
            if name in errors:
                continue
            with workers[name].on_turn():
                try:
                    with watched(workers[name]) as others:
                        answer = workers[name].ask("run", seed=number + 1)
                except EngineError as error:
                    errors[name] = str(error)
                    continue
            measured.append(limits.measure())
            around = {key: (measured[-2][key] + value) / 2 for key, value in measured[-1].items()}
            record["runs"].append({"engine": name, "round": number, "limits": around, **answer, **others})
    for name, worker in workers.items():
        if name not in errors:
            with worker.on_turn():
                worker.ask("finish")
    return record
