"""What a quantization cost: a table, a plot and the same as JSON, beside the weights."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_ms_models.cli.quantize.conversion import Errors
from vllm_ms_models.cli.quantize.writing import write_json

NAME = "quantization_report"
NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Report:
    """Everything that is reported; sizes in bytes, `errors` by module, `origins` what smoothing divided instead."""

    command: str
    scheme: str
    format: str
    errors: Mapping[str, Errors]
    sizes: Mapping[str, tuple[int, int]]
    total: tuple[int, int]
    ignored: list[str]
    prompts: int = 0
    tokens: int = 0
    more: bool = False
    group_size: int | None = None
    alpha: float | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """`quantization_report.md`, `.png` and `.json`."""
        (folder / f"{NAME}.md").write_text(self.markdown(), encoding="utf-8")
        write_json(folder / f"{NAME}.json", self.values())
        plot(self.errors, self.scheme, folder / f"{NAME}.png")

    def values(self) -> dict[str, Any]:
        return asdict(self)

    def markdown(self) -> str:
        before, after = self.total
        lines = [
            f"# Quantized to {self.scheme} ({self.format})",
            "",
            f"    {self.command}",
            "",
            f"Weights: {mib(before)} before, {mib(after)} after ({after / max(before, 1):.1%}).",
            self._calibration(),
        ]
        if self.group_size is not None:
            lines.append(f"Groups of {self.group_size} inputs have a common scale.")
        if self.alpha is not None:
            lines.append(
                f"SmoothQuant with alpha {self.alpha:g}: {len(self.origins)} of {len(self.errors)} modules smoothed."
            )
        lines += [f"In floats: {', '.join(f'`{name}`' for name in self.ignored) or 'no linear'}.", ""]
        lines += [
            "Relative errors (Frobenius norm): of the weight, and of the outputs for sampled inputs, rounded as in the "
            "scheme.",
            "",
            f"![relative error by layer]({NAME}.png)",
            "",
            "| module | scheme | weight error | output error | smoothed in | before | after |",
            "| --- | --- | ---: | ---: | --- | ---: | ---: |",
        ]
        for name, errors in self.errors.items():
            output = "" if errors.output is None else f"{errors.output:.5f}"
            sizes = " | ".join(mib(size) for size in self.sizes[name])
            lines.append(
                f"| {name} | {self.scheme} | {errors.weight:.5f} | {output} | {self.origins.get(name, '')} | {sizes} |"
            )
        return "\n".join(lines) + "\n"

    def _calibration(self) -> str:
        if not self.tokens:
            return "Not calibrated."
        rest = "; the file has more" if self.more else ""
        return f"Calibrated with {self.tokens} tokens in {self.prompts} prompts{rest}."


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def plot(errors: Mapping[str, Errors], scheme: str, path: Path) -> None:
    """Error by layer, a line for each kind of module; modules outside of the layers are horizontal lines."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    measured = any(error.output is not None for error in errors.values())
    figure = Figure(figsize=(11 if measured else 6.5, 4), layout="constrained")
    names = ["weight", "output"] if measured else ["weight"]
    for number, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), number)
        lines: dict[str, list[tuple[int, float]]] = {}
        for module, error in errors.items():
            layer = NUMBER.search(module)
            kind = module if layer is None else module[layer.end() :]
            value = getattr(error, name)
            lines.setdefault(kind, []).append((-1 if layer is None else int(layer[1]), value))
        for index, (kind, points) in enumerate(lines.items()):
            if points[0][0] < 0:
                axes.axhline(points[0][1], label=kind, color=f"C{index}", linestyle="--")
            else:
                axes.plot(*zip(*points, strict=True), label=kind, color=f"C{index}", marker=".")
        axes.set_xlabel("layer")
        axes.set_ylabel(f"relative error of the {name}")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(scheme)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.savefig(path, dpi=120)
