"""The cases that start processes: load time, start-up of servers, servers under mixed load, and answers."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean

from benchmarks import limits
from benchmarks.engines import EngineError, Worker
from benchmarks.models import DEMO_FOLDER
from benchmarks.peers import OURS
from benchmarks.processes import sampled_memory
from benchmarks.rounds import Record, turns
from benchmarks.serving import Load, Server


def time_load(names: Sequence[str], model: str, rounds: int, logs: Path) -> Record:
    """Fresh processes from spawn to a first token. The first start of each is not timed, only its memory is sampled."""
    record: Record = {"limits": [], "runs": [], "errors": {}, "peak_bytes": {}}
    errors = record["errors"]
    for name in names:
        try:
            with Worker(name, model, logs) as worker, sampled_memory(worker) as memory:
                worker.wait_ready()
            record["peak_bytes"][name] = memory["peak_bytes"]
        except EngineError as error:
            errors[name] = str(error)
    for number, order in turns(names, rounds):
        for name in order:
            if name in errors:
                continue
            try:
                with Worker(name, model, logs) as worker:
                    worker.wait_ready()
                times = {key: worker.about[key] for key in ("load_seconds", "first_token_seconds")}
                record["runs"].append({"engine": name, "round": number, **times})
            except EngineError as error:
                errors[name] = str(error)
    return record


def time_startup(names: Sequence[str], model: str, rounds: int, idle: float, logs: Path) -> Record:
    """Servers from spawn to 200 on /health, and the CPU they use while idle. The first start of each is not timed."""
    record: Record = {"limits": [], "runs": [], "errors": {}}
    errors = record["errors"]
    for number, order in turns(names, rounds + 1):
        for name in order:
            if name in errors:
                continue
            try:
                with Server(name, model, logs) as server:
                    seconds = server.wait_healthy()
                    run = {"engine": name, "round": number - 1, "startup_seconds": seconds}
                    if number:
                        record["runs"].append(run | {"idle_cpus": server.idle_cpu(idle)})
                    server.stop()
            except EngineError as error:
                errors[name] = str(error)
    return record


def time_mixed(names: Sequence[str], model: str, rounds: int, load: Load, logs: Path) -> Record:
    """All servers running, one on turn, the others paused. The warm-up load has its memory sampled, not its time."""
    record: Record = {"limits": [], "runs": [], "errors": {}, "peak_bytes": {}, "load": vars(load)}
    errors = record["errors"]
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in names:
            servers[name] = stack.enter_context(Server(name, model, logs))
            with servers[name].on_turn():
                try:
                    with sampled_memory(servers[name]) as memory:
                        servers[name].wait_healthy()
                        servers[name].bench(load, seed=0)
                    record["peak_bytes"][name] = memory["peak_bytes"]
                except EngineError as error:
                    errors[name] = str(error)
        record["limits"].append(limits.measure())
        for number, order in turns(names, rounds):
            for name in order:
                if name in errors:
                    continue
                with servers[name].on_turn():
                    try:
                        answer = servers[name].bench(load, seed=number + 1)
                        record["runs"].append({"engine": name, "round": number, **answer})
                    except EngineError as error:
                        errors[name] = str(error)
            record["limits"].append(limits.measure())
        for server in servers.values():
            server.stop()
    return record


def compare_answers(names: Sequence[str], model: str, logs: Path) -> Record:
    """The demo's held-out questions: the part of each engine's answers that is right, and that is as ours."""
    record: Record = {"limits": [], "runs": [], "errors": {}}
    lines = [json.loads(line) for line in (DEMO_FOLDER / "heldout.jsonl").read_text().splitlines()]
    ours: list[str] | None = None
    for name in names:
        try:
            with Worker(name, model, logs) as worker:
                worker.wait_ready()
                answers = worker.ask("chat", questions=[line["question"] for line in lines], tokens=40)["answers"]
        except EngineError as error:
            record["errors"][name] = str(error)
            continue
        ours = answers if name == OURS else ours
        right = fmean(answer == line["answer"] for answer, line in zip(answers, lines, strict=True))
        same = fmean(a == b for a, b in zip(answers, ours, strict=True)) if ours else 0.0
        record["runs"].append({"engine": name, "round": 0, "right": right, "as_ours": same})
    return record
