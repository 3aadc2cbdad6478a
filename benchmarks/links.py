"""What several ranks send each other for a step, in bytes, and how long a link takes for that.

    python -m benchmarks.links qwen2.5-32b --tensor 4 --tokens 1 --bandwidth 50 --latency 20

counts what the layers ask of their groups (tests/benchmarks/test_links.py counts the calls of real models). A rank of
n sends 2 (n - 1) / n of what it sums (a reduce-scatter and an all-gather), n - 1 times what it gathers, and (n - 1) / n
of what it sums and scatters (Thakur et al., 2005, sections 4.1 and 4.4 to 4.5).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

SENT = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: n - 1,
    "reduce_scatter": lambda n: (n - 1) / n,
    "send": lambda n: 1,
}


@dataclass(frozen=True)
class Shape:
    """Of a published model's config.json."""

    hidden: int
    layers: int
    vocabulary: int
    layers_of_experts: int = 0


SHAPES = {
    "qwen2.5-0.5b": Shape(896, 24, 151936),
    "qwen2.5-32b": Shape(5120, 64, 152064),
    "deepseek-r1": Shape(7168, 61, 129280, 58),
}


@dataclass(frozen=True)
class Layout:
    """Ranks by kind; with `data` above 1, each data-parallel rank has tokens of its own."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1


@dataclass(frozen=True)
class Traffic:
    """`calls` collectives among `ranks` in a step, to each of which a rank gives `given` bytes."""

    what: str
    collective: str
    ranks: int
    calls: int
    given: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in the step."""
        return self.calls * self.given * SENT[self.collective](self.ranks)


def traffic(shape: Shape, layout: Layout, tokens: int, sampled: int, itemsize: int = 2) -> Iterator[Traffic]:
    """Of a step with `tokens` tokens, `sampled` of which get logits (float32), on each data-parallel rank."""
    rows, n = tokens * shape.hidden * itemsize, layout.tensor
    if n > 1:
        yield Traffic("sums of layers and embedding", "all_reduce", n, 2 * shape.layers + 1, rows)
        yield Traffic("logits", "all_gather", n, 1, sampled * -(-shape.vocabulary // n) * 4)
    if layout.pipeline > 1:
        yield Traffic("hidden states and residual", "send", 2, layout.pipeline - 1, 2 * rows)
    if layout.data > 1 and shape.layers_of_experts:
        yield Traffic("tokens to all experts", "all_gather", layout.data, shape.layers_of_experts, rows)
        yield Traffic("experts' results", "reduce_scatter", layout.data, shape.layers_of_experts, layout.data * rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SHAPES)
    for name, default in (("tensor", 1), ("pipeline", 1), ("data", 1), ("tokens", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sampled", type=int, help="rows that get logits (default: as many as tokens)")
    parser.add_argument("--bandwidth", type=float, required=True, help="GB/s that a rank can send")
    parser.add_argument("--latency", type=float, required=True, help="microseconds of a collective of nothing")
    given = parser.parse_args()
    layout = Layout(given.tensor, given.pipeline, given.data)
    total = 0.0
    print(f"{'':30} {'calls':>6} {'KB sent':>10} {'ms':>8}")
    for part in traffic(SHAPES[given.model], layout, given.tokens, given.sampled or given.tokens):
        milliseconds = part.calls * given.latency / 1e3 + part.sent / given.bandwidth / 1e6
        total += milliseconds
        print(f"{part.what:30} {part.calls:6} {part.sent / 1e3:10.1f} {milliseconds:8.2f}")
    print(f"{'a step':30} {'':6} {'':10} {total:8.2f}")


if __name__ == "__main__":
    main()
