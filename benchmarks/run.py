"""Side by side: this package and what one would run instead on the same CPU; `make bench` runs it.

All engines get the same weights, prompts and options, take turns, and are paused while others are measured. The table
has medians, spreads, ratios of the same round, and the part of the machine's own limits that was reached.
"""

import argparse
import datetime
import json
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import cases, machine, peers, plots, report, services
from benchmarks.engines import EngineError, Worker
from benchmarks.models import DEMO, NAMES, checkpoint, split
from benchmarks.rounds import Record, time_case
from benchmarks.serving import QUICK_LOAD, Load

RESULTS = Path(__file__).with_name("results")
# By default; the others are for trying, too slow, or more than all engines can hold at once.
MODELS = [name for name in NAMES if split(name)[0] not in ("tiny", "qwen2.5-7b", "deepseek-v3-2b")]
IDLE_SECONDS = 20


def options_from(arguments: list[str]) -> argparse.Namespace:
    """The options; --models, --cases and --engines take names separated by commas or spaces."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)

    def names(option: str, choices: tuple[str, ...], default: list[str], help: str) -> None:
        parser.add_argument(
            option, nargs="+", action="extend", choices=choices, metavar="NAME", help=f"{help}: {', '.join(choices)}"
        )
        parser.set_defaults(**{f"all_{option.lstrip('-')}": default})

    names("--models", tuple(NAMES), MODELS, "shapes, or quantized ones")
    names("--cases", cases.NAMES, list(cases.NAMES), "what to time")
    names("--engines", peers.ENGINES, list(peers.ENGINES), "who takes part")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every engine in every case (default 3)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results (default: benchmarks/results/<date>); what it holds is added to",
    )
    parser.add_argument("--quick", action="store_true", help="smaller cases, to try the benchmark: figures mean little")
    options = parser.parse_args([word for argument in arguments for word in argument.split(",") if word])
    for name in ("models", "cases", "engines"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name) or getattr(options, f"all_{name}"))))
    if options.rounds < 1:
        parser.error("--rounds must be at least 1.")
    return options


class Benchmark:
    """Results as they come, written after every case."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        date = datetime.datetime.now().astimezone()
        self.out: Path = (options.out or RESULTS / date.strftime("%Y-%m-%d-%H%M%S")).resolve()
        self.logs = self.out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = {
            "date": date.isoformat(timespec="seconds"),
            "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
            "machine": machine.describe(),
            "commit": machine.commit(),
            "engines": list(options.engines),
            "about": {},
            "unusable": {},
            "models": {},
        }
        if (stored := self.out / "results.json").exists():
            self._continue(json.loads(stored.read_text()))
        self.engines: list[str] = []

    def _continue(self, earlier: dict[str, Any]) -> None:
        """Keep what was measured before; cases that are timed again are replaced."""
        now = self.results
        now["command"] = f"{earlier['command']}; {now['command']}"
        now["models"], now["about"] = earlier["models"], earlier["about"]
        now["engines"] = [name for name in peers.ENGINES if name in (*earlier["engines"], *now["engines"])]

    def set_up(self) -> None:
        for name in self.options.engines:
            try:
                peers.set_up(name)
                self.engines.append(name)
            except peers.SetUpError as error:
                self.results["unusable"][name] = str(error)

    def save(self) -> None:
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.out / "results.md").write_text(report.markdown(self.results))

    def add(self, model: str, name: str, measure: Callable[[], Record]) -> None:
        print(f"{model}: {name}", flush=True)
        record = measure()
        self.results["models"].setdefault(model, {})[name] = record
        self.save()
        for line in report.progress(self.results, model, name):
            print(f"  {line}", flush=True)

    def model(self, model: str) -> None:
        """All cases of one model."""
        rounds, quick, wanted = self.options.rounds, self.options.quick, self.options.cases
        checkpoint(model)
        serving = [name for name in self.engines if name in peers.VLLM_ENGINES]
        engines = self.engines if split(model)[1] is None else serving  # the others have formats of their own
        if split(model)[0] == DEMO:
            if cases.ANSWERS in wanted:
                self.add(model, cases.ANSWERS, lambda: services.compare_answers(serving, model, self.logs))
            return
        if steps := cases.steps(tuple(wanted), quick):
            self.steps(model, engines, steps)
        if cases.LOAD in wanted:
            self.add(model, cases.LOAD, lambda: services.time_load(engines, model, rounds, self.logs))
        if cases.STARTUP in wanted:
            idle = 5 if quick else IDLE_SECONDS
            self.add(model, cases.STARTUP, lambda: services.time_startup(serving, model, rounds, idle, self.logs))
        if cases.MIXED in wanted:
            load = QUICK_LOAD if quick else Load()
            self.add(model, cases.MIXED, lambda: services.time_mixed(serving, model, rounds, load, self.logs))

    def steps(self, model: str, engines: list[str], steps: list[cases.Case]) -> None:
        """The fixed-size cases: all engines are started, then asked in turns."""
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            failed: dict[str, str] = {}
            for name in engines:
                print(f"{model}: starting {name}", flush=True)
                try:
                    worker = stack.enter_context(Worker(name, model, self.logs))
                    worker.wait_ready()
                    worker.pause()
                    workers[name] = worker
                    self.results["about"].setdefault(model, {})[name] = worker.about
                except (EngineError, peers.SetUpError) as error:
                    failed[name] = f"did not start: {error}"
                    print(f"  {name} {failed[name]}", flush=True)
            for case in steps:
                self.add(model, case.name, lambda case=case: self.one(workers, failed, case))  # type: ignore[misc]

    def one(self, workers: dict[str, Worker], failed: dict[str, str], case: cases.Case) -> Record:
        record = time_case(workers, case, self.options.rounds)
        record["errors"].update(failed)
        return record


def main() -> None:
    options = options_from(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit("stopped"))
    benchmark = Benchmark(options)
    try:
        benchmark.set_up()
        for model in options.models:
            benchmark.model(model)
    except KeyboardInterrupt:
        sys.exit(f"Stopped; what was measured is in {benchmark.out}.")
    plots.draw(benchmark.results, benchmark.out)
    print(f"\n{report.markdown(benchmark.results)}\nResults: {benchmark.out}")


if __name__ == "__main__":
    main()
