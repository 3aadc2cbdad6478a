"""What this package wants to reach on the 0.5B shape and with quantized models, and whether it does."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from benchmarks import cases
from benchmarks.models import DEMO
from benchmarks.peers import LLAMA_CPP, VLLM_CPU, ZENTORCH
from benchmarks.summary import Row, floor_gib

MODEL = "qwen2.5-0.5b"
ALL = (VLLM_CPU, ZENTORCH, LLAMA_CPP)
VLLM = (VLLM_CPU, ZENTORCH)


@dataclass(frozen=True)
class Verdict:
    """One target: what was wanted, what was found (None: not measured), and whether that is enough."""

    what: str
    wanted: str
    found: str | None
    met: bool | None


@dataclass(frozen=True)
class Ratio:
    """Ours over the best of `peers`: at least `least`, or at most `most`."""

    case: str
    metric: str
    peers: tuple[str, ...]
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Part:
    """The part of a limit (a field of Row) that is to be reached."""

    case: str
    metric: str
    kind: str
    least: float


RATIOS = (
    Ratio("decode-1", "decode", ALL, 1.05),
    Ratio("decode-8", "decode", ALL, 1.4),
    Ratio("decode-32", "decode", ALL, 1.7),
    Ratio("prefill-128", "prefill", ALL, 1.4),
    Ratio("prefill-1024", "prefill", ALL, 1.4),
    Ratio("prefill-8192", "prefill", ALL, 1.3),
    Ratio("decode-1-16k", "decode", ALL, 1.3),
    Ratio(cases.MIXED, "output", VLLM, 1.5),
    Ratio(cases.MIXED, "ITL p99", VLLM, most=1.0),
    Ratio(cases.LOAD, "load weights", VLLM, most=1.0),
    Ratio(cases.STARTUP, "spawn to healthy", VLLM, most=1.0),
    Ratio(cases.MIXED, "peak memory", VLLM, most=1.0),
)
PARTS = (
    Part("decode-1", "decode", "of_bandwidth", 0.80),
    Part("decode-8", "decode", "of_limit", 0.70),
    Part("decode-32", "decode", "of_peak", 0.60),
    Part("prefill-128", "prefill", "of_peak", 0.65),
    Part("prefill-1024", "prefill", "of_peak", 0.65),
)
QUANTIZED_RATIOS = (
    Ratio("decode-1", "decode", VLLM, 1.3),
    Ratio("decode-32", "decode", VLLM, 1.5),
    Ratio("prefill-128", "prefill", VLLM, 1.5),
    Ratio("prefill-1024", "prefill", VLLM, 1.5),
    Ratio("prefill-8192", "prefill", VLLM, 1.5),
)
TARGETS: dict[str, tuple[tuple[Ratio, ...], tuple[Part, ...]]] = {
    MODEL: (RATIOS, PARTS),
    **{
        f"{shape}-w8a8": (QUANTIZED_RATIOS, (Part("decode-1", "decode", "of_limit", 0.75),))
        for shape in ("qwen2.5-0.5b", "qwen2.5-1.5b")
    },
    **{
        f"{shape}-w4a16": ((), (Part("decode-1", "decode", "of_limit", 0.65),))
        for shape in ("qwen2.5-0.5b", "qwen2.5-1.5b")
    },
}
# Percentage points of right answers that a quantized model may lose.
LOSSES = {"demo-w8a8": 1.0, "demo-w8a8-static": 1.0, "demo-w8a8-head": 1.0, "demo-w4a16": 3.0}
RIGHT = "answers that are right"
_LIMITS = {"of_bandwidth": "read bandwidth", "of_limit": "the limit", "of_peak": "the dot-product peak"}
WORKING_GIB = 1.0


def _ratio(target: Ratio, row: Row | None) -> Verdict:
    sign, bound = (">=", target.least) if target.least is not None else ("<=", target.most)
    what, wanted = f"{target.case}: {target.metric} against the best peer", f"{sign} {bound:.2f}"
    # For the ITL the peer to equal is the one with the highest output: `judge` hands in a row of that peer alone.
    peer = row.best(target.peers) if row else None
    value = row.ratio(peer) if row and peer else None
    if value is None or bound is None:
        return Verdict(what, wanted, None, None)
    met = value >= bound if target.least is not None else value <= bound
    return Verdict(what, wanted, f"{value:.2f} ({peer})", met)


def judge(rows: Iterable[Row]) -> Iterator[tuple[str, Verdict]]:
    """(model, target) of every model that was measured, in order; targets without figures have `met` None."""
    found = {(row.model, row.case, row.metric): row for row in rows}
    for model, (ratios, parts) in TARGETS.items():
        if not any(key[0] == model for key in found):
            continue
        own = {(case, metric): row for (name, case, metric), row in found.items() if name == model}
        yield from ((model, verdict) for verdict in _ratios(ratios, own))
        yield from ((model, _part(part, own.get((part.case, part.metric)))) for part in parts)
        if model == MODEL:
            yield from ((model, verdict) for verdict in _memory(own))
    reference = found.get((DEMO, cases.ANSWERS, RIGHT))
    for model, most in LOSSES.items():
        if (row := found.get((model, cases.ANSWERS, RIGHT))) is not None:
            yield model, _loss(row, reference, most)


def _ratios(targets: Iterable[Ratio], rows: Mapping[tuple[str, str], Row]) -> Iterator[Verdict]:
    output = rows.get((cases.MIXED, "output"))
    fastest = output.best(VLLM) if output else None
    for target in targets:
        if target.metric == "ITL p99" and fastest:
            target = Ratio(target.case, target.metric, (fastest,), most=target.most)
        yield _ratio(target, rows.get((target.case, target.metric)))


def _part(part: Part, row: Row | None) -> Verdict:
    value = getattr(row, part.kind).get("ours") if row else None
    return Verdict(
        f"{part.case}: {_LIMITS[part.kind]}",
        f">= {part.least:.0%}",
        None if value is None else f"{value:.0%}",
        None if value is None else value >= part.least,
    )


def _memory(rows: Mapping[tuple[str, str], Row]) -> Iterator[Verdict]:
    most = floor_gib(MODEL) + WORKING_GIB
    for case in (cases.MIXED, "offline"):
        row = rows.get((case, "peak memory"))
        size = row.middle("ours") if row else None
        yield Verdict(
            f"{case}: peak memory, weights + KV cache + {WORKING_GIB:g} GiB",
            f"<= {most:.2f} GiB",
            None if size is None else f"{size:.2f} GiB",
            None if size is None else size <= most,
        )


def _loss(row: Row, reference: Row | None, most: float) -> Verdict:
    before, after = reference.middle("ours") if reference else None, row.middle("ours")
    lost = None if before is None or after is None else before - after
    return Verdict(
        f"{cases.ANSWERS}: points lost of those that are right",
        f"<= {most:g}",
        None if lost is None else f"{lost:.1f}",
        None if lost is None else lost <= most,
    )
