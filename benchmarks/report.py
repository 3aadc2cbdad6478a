"""The figures as Markdown."""

from collections.abc import Iterator, Sequence
from statistics import median

from benchmarks import targets
from benchmarks.peers import OURS
from benchmarks.summary import Results, Row, cores, floor_gib, rows


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def figure(value: float) -> str:
    """Three significant digits, no exponent."""
    if value >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cell(row: Row, engine: str) -> str:
    """Median and spread of an engine, "failed" if it did, "-" if it took no part."""
    middle = row.middle(engine)
    if middle is None:
        return "failed" if engine in row.errors else "-"
    text = figure(middle)
    if len(row.samples[engine]) > 1:
        low, high = row.spread(engine)
        text += f" ({figure(low)} to {figure(high)})"
    return text + (" then failed" if engine in row.errors else "")


def _part(values: dict[str, float]) -> str:
    return f"{values[OURS]:.0%}" if OURS in values else "-"


def _model(model: str, found: Sequence[Row], engines: Sequence[str]) -> Iterator[str]:
    others = [engine for engine in engines if engine != OURS]
    yield f"## {model}\n"
    yield "Medians (smallest to largest of the rounds).\n"
    head = ["case", "figure", *engines]
    yield table(head, [[r.case, f"{r.metric}, {r.unit}", *(cell(r, e) for e in engines)] for r in found])
    yield f"\nWeights and KV cache: {floor_gib(model):.2f} GiB.\n"
    lines = []
    for row in found:
        ratios = ["-" if (ratio := row.ratio(peer)) is None else f"{ratio:.2f}" for peer in others]
        better = "higher" if row.higher_is_better else "lower"
        parts = [_part(v) for v in (row.of_limit, row.model_of_limit, row.of_bandwidth, row.of_peak)]
        lines.append([row.case, row.metric, better, *ratios, *parts])
    yield "Ours over theirs (median of the ratios within each round), and the part of the limits that ours reached.\n"
    limits = ["of limit", "of limit, model alone", "of read bandwidth", "of dot-product peak"]
    yield table(["case", "figure", "better is", *(f"ours / {e}" for e in others), *limits], lines) + "\n"


def _busy(results: Results) -> Iterator[str]:
    """Which cores each engine kept busy, and the limits, per case."""
    lines = []
    for model, records in results["models"].items():
        for name, record in records.items():
            if record.get("limits"):
                limits = [
                    figure(median(measured[key] for measured in record["limits"]))
                    + " ({} to {})".format(
                        *(figure(f(measured[key] for measured in record["limits"])) for f in (min, max))
                    )
                    for key in ("read_gb_s", "bf16_gflop_s")
                ]
                busy = cores(record) if "case" in record else {}
                others = max((run.get("foreign_cpus", 0.0) for run in record["runs"]), default=0.0)
                own = [f"{busy[e]:.2f}" if e in busy else "-" for e in results["engines"]]
                lines.append([model, name, *limits, *own, f"{others:.2f}" if busy else "-"])
    if lines:
        yield "## Limits measured between the rounds, and CPUs kept busy\n"
        heads = [f"CPUs, {engine}" for engine in results["engines"]]
        yield table(["model", "case", "read GB/s", "bf16 GFLOP/s", *heads, "used by others, at most"], lines) + "\n"


def _targets(found: Sequence[Row]) -> Iterator[str]:
    lines = []
    for model, verdict in targets.judge(found):
        met = {True: "yes", False: "no", None: "not measured"}[verdict.met]
        lines.append([model, verdict.what, verdict.wanted, verdict.found or "-", met])
    if lines:
        yield "## Targets\n"
        yield table(["shape", "target", "wanted", "found", "met"], lines) + "\n"


def _failures(results: Results, found: Sequence[Row]) -> Iterator[str]:
    lines = [f"- {engine}: {why}" for engine, why in results["unusable"].items()]
    seen = {(row.model, row.case, engine): why for row in found for engine, why in row.errors.items()}
    lines += [f"- {model}, {case}, {engine}: {why}" for (model, case, engine), why in seen.items()]
    if lines:
        yield "## Failures\n"
        yield "\n".join(lines) + "\n"


def markdown(results: Results) -> str:
    """The whole report."""
    found = list(rows(results))
    machine = results["machine"]
    parts = [
        "# Side by side\n",
        f"{results['date']}, commit {results['commit']}, `{results['command']}`\n",
        f"{machine['cpu']} ({', '.join(machine['instructions'])}), {machine['cpus']} CPUs, "
        f"{machine['memory_gib']} GiB, Linux {machine['kernel']}, Python {machine['python']}\n",
    ]
    for model in results["models"]:
        parts += _model(model, [row for row in found if row.model == model], results["engines"])
    parts += _targets(found)
    parts += _failures(results, found)
    parts += _busy(results)
    return "\n".join(parts)


def progress(results: Results, model: str, case: str) -> Iterator[str]:
    """One line for each figure of a case that has just been measured."""
    for row in rows(results):
        if (row.model, row.case) == (model, case):
            values = ", ".join(f"{engine} {cell(row, engine)}" for engine in results["engines"])
            yield f"{row.metric} [{row.unit}]: {values}"
            for engine, why in row.errors.items():
                yield f"{engine} failed: {why}"
