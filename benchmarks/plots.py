"""The figures as bar charts, PNG and SVG."""

from pathlib import Path

from benchmarks.summary import Results, Row, rows

# metrics that are charted together: file name, title, metrics
_CHARTS = (
    ("speed", "tokens per second (higher is better)", ("decode", "prefill", "output")),
    ("latency", "milliseconds under mixed load (lower is better)", ("TTFT p50", "TTFT p99", "ITL p50", "ITL p99")),
    ("time", "seconds (lower is better)", ("load weights", "process to first token", "spawn to healthy")),
    ("memory", "peak GiB (lower is better)", ("peak memory",)),
)


def _chart(found: list[Row], engines: list[str], title: str, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.2 * columns, 2.8 * lines), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, row in zip(axes.flat, found, strict=False):
        present = [engine for engine in engines if row.samples.get(engine)]
        middles = [row.middle(engine) or 0.0 for engine in present]
        spreads = [row.spread(engine) for engine in present]
        errors = [
            [m - low for m, (low, _) in zip(middles, spreads, strict=True)],
            [high - m for m, (_, high) in zip(middles, spreads, strict=True)],
        ]
        colours = [f"C{engines.index(engine)}" for engine in present]
        axis.bar(present, middles, yerr=errors, color=colours, capsize=3)
        axis.set_title(row.case if row.metric in ("decode", "prefill") else f"{row.case}: {row.metric}", fontsize=9)
        axis.tick_params(axis="x", labelrotation=35, labelsize=7)
        axis.tick_params(axis="y", labelsize=7)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    for kind in ("png", "svg"):
        figure.savefig(target.with_name(f"{target.name}.{kind}"), dpi=120)
    pyplot.close(figure)


def draw(results: Results, out: Path) -> None:
    """`<model>-<chart>.png` and `.svg` in `out`: medians, with the smallest and largest of the rounds."""
    found = list(rows(results))
    for model in results["models"]:
        for name, title, metrics in _CHARTS:
            part = [row for row in found if row.model == model and row.metric in metrics and row.samples]
            if part:
                _chart(part, list(results["engines"]), f"{model}: {title}", out / f"{model}-{name}")
