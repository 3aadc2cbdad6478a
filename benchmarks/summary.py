"""From the samples of a benchmark to figures: medians, spreads, ratios within rounds, parts of the limits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.cost import Cost, Decoder, Shape
from benchmarks.cost_latent import LatentShape
from benchmarks.models import CONFIGS, split
from benchmarks.peers import OURS

Results = Mapping[str, Any]


@dataclass
class Row:
    """One figure of one case: samples {engine: {round: value}} in `unit`, and why an engine has none."""

    model: str
    case: str
    metric: str
    unit: str
    higher_is_better: bool
    samples: dict[str, dict[int, float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    # {engine: part reached}: of the limit that binds, of read bandwidth alone, of the dot-product peak alone,
    # and of the binding limit by the model alone (without scheduler and sampler)
    of_limit: dict[str, float] = field(default_factory=dict)
    of_bandwidth: dict[str, float] = field(default_factory=dict)
    of_peak: dict[str, float] = field(default_factory=dict)
    model_of_limit: dict[str, float] = field(default_factory=dict)

    def middle(self, engine: str) -> float | None:
        """Median over the rounds; None without samples."""
        values = self.samples.get(engine)
        return median(values.values()) if values else None

    def spread(self, engine: str) -> tuple[float, float]:
        values = self.samples[engine].values()
        return min(values), max(values)

    def ratio(self, peer: str) -> float | None:
        """Ours over the peer's: the median of the ratios within each round, so that drift between rounds cancels."""
        ours, theirs = self.samples.get(OURS, {}), self.samples.get(peer, {})
        pairs = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
        return median(pairs) if pairs else None

    def best(self, among: Sequence[str]) -> str | None:
        """The engine of `among` with the best median; None if none has samples."""
        found = [(value, name) for name in among if (value := self.middle(name)) is not None]
        if not found:
            return None
        return (max if self.higher_is_better else min)(found)[1]


def shape_of(model: str) -> Decoder:
    shape, scheme = split(model)
    kind = LatentShape if "kv_lora_rank" in CONFIGS[shape] else Shape
    return kind.of(CONFIGS[shape], scheme)


def _step_row(model: str, name: str, record: Results) -> Row:
    case, shape = Case(**record["case"]), shape_of(model)
    metric = "prefill" if case.kind == "prefill" else "decode"
    row = Row(model, name, metric, "tok/s", True, errors=dict(record["errors"]))
    parts: dict[str, dict[str, list[float]]] = {}
    for run in record["runs"]:
        engine, measured = run["engine"], run["limits"]
        row.samples.setdefault(engine, {})[run["round"]] = case.rate(run)
        cost = case.cost(shape, run)
        found = parts.setdefault(engine, {})
        seconds = cost.seconds(measured)
        found.setdefault("of_limit", []).append(seconds / run["seconds"])
        found.setdefault("of_bandwidth", []).append(Cost(cost.bytes, 0).seconds(measured) / run["seconds"])
        found.setdefault("of_peak", []).append(Cost(0, cost.flops, cost.int8_ops).seconds(measured) / run["seconds"])
        if run.get("model_seconds"):
            found.setdefault("model_of_limit", []).append(seconds / run["model_seconds"])
    for engine, lists in parts.items():
        for kind, values in lists.items():
            getattr(row, kind)[engine] = median(values)
    return row


# case, key in a run, metric, unit, higher is better, factor
_SERVICES = (
    (cases.LOAD, "load_seconds", "load weights", "s", False, 1.0),
    (cases.LOAD, "first_token_seconds", "process to first token", "s", False, 1.0),
    (cases.STARTUP, "startup_seconds", "spawn to healthy", "s", False, 1.0),
    (cases.STARTUP, "idle_cpus", "CPU while idle", "%", False, 100.0),
    (cases.ANSWERS, "right", "answers that are right", "%", True, 100.0),
    (cases.ANSWERS, "as_ours", "answers that are as ours", "%", True, 100.0),
    (cases.MIXED, "output_tok_s", "output", "tok/s", True, 1.0),
    (cases.MIXED, "ttft_p50_ms", "TTFT p50", "ms", False, 1.0),
    (cases.MIXED, "ttft_p99_ms", "TTFT p99", "ms", False, 1.0),
    (cases.MIXED, "itl_p50_ms", "ITL p50", "ms", False, 1.0),
    (cases.MIXED, "itl_p99_ms", "ITL p99", "ms", False, 1.0),
)


def _memory_row(model: str, name: str, records: Sequence[Results]) -> Row:
    """Peak memory in GiB: the largest of the cases' warm-ups (one sample)."""
    row = Row(model, name, "peak memory", "GiB", False)
    for record in records:
        for engine, size in record.get("peak_bytes", {}).items():
            largest = row.samples.setdefault(engine, {0: 0.0})
            largest[0] = max(largest[0], size / 2**30)
    return row


def rows(results: Results) -> Iterator[Row]:
    """All figures, model by model."""
    for model, records in results["models"].items():
        offline = []
        for name, record in records.items():
            if "case" in record:
                yield _step_row(model, name, record)
            for case, key, metric, unit, higher, factor in _SERVICES:
                if case == name:
                    row = Row(model, name, metric, unit, higher, errors=dict(record["errors"]))
                    for run in record["runs"]:
                        row.samples.setdefault(run["engine"], {})[run["round"]] = run[key] * factor
                    yield row
            if name == cases.MIXED:
                yield _memory_row(model, name, [record])
            elif record.get("peak_bytes"):
                offline.append(record)
        if offline:
            yield _memory_row(model, "offline", offline)


def floor_gib(model: str) -> float:
    """GiB of weights and KV cache: what an engine must hold."""
    return shape_of(model).weight_bytes / 2**30 + cases.KV_GIB


def cores(record: Results) -> dict[str, float]:
    """{engine: CPUs kept busy} over the runs of a fixed-size case."""
    found: dict[str, list[float]] = {}
    for run in record["runs"]:
        found.setdefault(run["engine"], []).append(run["cpu_seconds"] / run["seconds"])
    return {engine: fmean(values) for engine, values in found.items()}
