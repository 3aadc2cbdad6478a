"""Each CPU kernel over the shapes of a real model, beside the limit that binds it: `python benchmarks/kernels.py`.

The limit of a call is the larger of its bytes over the measured read bandwidth and its operations over the measured
peak; "of limit" is that time over the kernel's own (median of its calls). The limits are measured before and after
each shape's calls, because machines drift, and the mean of both is used.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import mindspore as ms
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import limits

from vllm_ms_models import compat
from vllm_ms_models.kernels import SCALE_BYTES, Integers, PagedSequences, Weight
from vllm_ms_models.kernels.cpu import CpuKernels

# hidden, intermediate, heads, KV heads, head size, vocabulary
MODELS = {
    "qwen2.5-0.5b": (896, 4864, 14, 2, 64, 151936),
    "qwen2.5-1.5b": (1536, 8960, 12, 2, 128, 151936),
    "llama-3.2-1b": (2048, 8192, 32, 8, 64, 128256),
}
DTYPES = {"bfloat16": ms.bfloat16, "float16": ms.float16, "float32": ms.float32}
SCHEMES = {
    "w8a8": Integers(8, 0, "dynamic"),
    "w8a16": Integers(8, 0, "float"),
    "w4a16": Integers(4, 128, "float"),
}
ATTENTION = (
    (1, 4096, 1),
    (1, 16384, 1),
    (1, 256, 32),
    (128, 128, 1),
    (1024, 1024, 1),
    (8192, 8192, 1),
)  # of context, sequences
BLOCK = 32
BEYOND_CACHES = 256 << 20  # bytes of weights or contexts that calls take turns with: a model's are never cached


@dataclass(frozen=True)
class Case:
    """One call: what it runs, the bytes it must read at least, the floating-point operations it must do."""

    name: str
    call: Callable[[], Any]
    bytes: float
    flops: float


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    rows: int
    microseconds: float
    gb_s: float
    gflop_s: float
    of_limit: float


def tensor(values: np.ndarray, dtype: Any = None) -> ms.Tensor:
    return ms.Tensor(values).astype(dtype) if dtype is not None else ms.Tensor(values)


def new_weight(kernels: CpuKernels, sizes: list[int], inputs: int, kind: Any) -> tuple[Weight, float]:
    """A weight of `kind` (a dtype or `Integers`) full of random numbers, and its bytes."""
    rng = np.random.default_rng(0)
    if isinstance(kind, Integers):
        half = 1 << (kind.bits - 1)
        integers = rng.integers(-half, half, 100_003, np.int8)
        weight = kernels.new_integer_weight(sizes, inputs, kind)
        for part, count in enumerate(sizes):
            kernels.load_integers(weight, part, 0, np.resize(integers, (count, inputs)))
            kernels.load_scales(weight, part, 0, np.full((count, kind.groups(inputs)), 1e-3, np.float32))
        return weight, sum(sizes) * (inputs * kind.bits / 8 + 4 * kind.groups(inputs))
    floats = rng.normal(size=100_003).astype(np.float32)
    weight = kernels.new_weight(sizes, inputs, kind)
    for part, count in enumerate(sizes):
        kernels.load_rows(weight, part, 0, np.resize(floats, (count, inputs)))
    return weight, sum(sizes) * inputs * (4 if kind == ms.float32 else 2)


def linears(kernels: CpuKernels, model: str, dtype: Any, kind: Any, rows: int) -> Iterator[Case]:
    """The matrix products of one layer with weights of `kind`, and the head, which stays in `dtype`."""
    hidden, intermediate, heads, kv_heads, size, vocab = MODELS[model]
    width = 4 if dtype == ms.float32 else 2
    shapes = {
        "qkv": ([heads * size, kv_heads * size, kv_heads * size], hidden),
        "o": ([hidden], heads * size),
        "gate_up": ([intermediate, intermediate], hidden),
        "down": ([hidden], intermediate),
        "lm_head": ([vocab], hidden),
    }
    rng = np.random.default_rng(0)
    for name, (sizes, inputs) in shapes.items():
        if name == "lm_head" and (rows > 128 or isinstance(kind, Integers)):
            continue  # only sampled rows get there
        weight, weight_bytes = new_weight(kernels, sizes, inputs, kind)
        weights = [weight]
        while len(weights) * weight_bytes < BEYOND_CACHES:
            weights.append(new_weight(kernels, sizes, inputs, kind)[0])
        turn = cycle(weights)
        x = tensor(rng.normal(size=(rows, inputs)).astype(np.float32), dtype)
        total = sum(sizes)
        moved = weight_bytes + width * rows * (inputs + total)
        yield Case(name, lambda x=x, turn=turn: kernels.linear_split(x, next(turn)), moved, 2.0 * rows * total * inputs)


def new_cache(kernels: CpuKernels, blocks: int, kv_heads: int, size: int, dtype: Any, storage: Any) -> ms.Tensor:
    """A layer's cache full of random numbers."""
    rng = np.random.default_rng(0)
    shape = kernels.cache_shape(blocks, BLOCK, kv_heads, size, storage)
    floats = rng.normal(size=100_003).astype(np.float32)
    if storage is None:
        return tensor(np.resize(floats, shape), dtype)
    cache = tensor(np.zeros(shape, np.int8))
    for first in range(0, blocks * BLOCK, 1 << 16):
        slots = np.arange(first, min(first + (1 << 16), blocks * BLOCK))
        rows = tensor(np.resize(floats, (len(slots), kv_heads * size)), dtype)
        kernels.write_kv(rows, rows, cache, tensor(slots))
    return cache


def attention(
    kernels: CpuKernels, model: str, dtype: Any, queries: int, context: int, sequences: int, storage: Any = None
) -> Case:
    """Causal attention of the last `queries` positions of each of `sequences` contexts, in blocks in no order.

    `storage` is ms.int8 for a cache of int8, None for one of `dtype`.
    """
    _, _, heads, kv_heads, size, _ = MODELS[model]
    width = 4 if dtype == ms.float32 else 2
    row = size * width if storage is None else size + SCALE_BYTES
    blocks = sequences * -(-context // BLOCK)
    rng = np.random.default_rng(0)
    turns = -(-BEYOND_CACHES // (blocks * BLOCK * 2 * kv_heads * row)) if queries == 1 else 1
    cache = new_cache(kernels, blocks * turns, kv_heads, size, dtype, storage)
    order = rng.permutation(blocks * turns).astype(np.int32).reshape(turns, sequences, -1)
    paged = [
        PagedSequences(
            tensor(np.arange(sequences + 1, dtype=np.int32) * queries),
            tensor(np.full(sequences, context, np.int32)),
            tensor(tables),
            queries,
            context,
        )
        for tables in order
    ]
    turn = cycle(paged)
    query = tensor(rng.normal(size=(sequences * queries, heads * size)).astype(np.float32), dtype)
    pairs = sequences * (queries * context - queries * (queries - 1) / 2)
    return Case(
        f"attention {queries} of {context}, {sequences} seq.",
        lambda: kernels.paged_attention(query, cache, next(turn), size**-0.5),
        sequences * context * 2 * kv_heads * row + width * 2 * sequences * queries * heads * size,
        4.0 * pairs * heads * size,
    )


def median_seconds(call: Callable[[], Any], budget: float = 0.4) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def judged(cases: list[Case], rows: int, peak: str) -> Iterator[Row]:
    before = limits.measure()
    times = [median_seconds(case.call) for case in cases]
    after = limits.measure()
    bandwidth = (before["read_gb_s"] + after["read_gb_s"]) / 2 * 1e9
    flops = (before[peak] + after[peak]) / 2 * 1e9
    for case, seconds in zip(cases, times, strict=True):
        limit = max(case.bytes / bandwidth, case.flops / flops if flops else 0)
        yield Row(
            case.name, rows, seconds * 1e6, case.bytes / seconds / 1e9, case.flops / seconds / 1e9, limit / seconds
        )


def compare_caches(kernels: CpuKernels, model: str, dtype: Any) -> None:
    """Attention over a cache of `dtype` and one of int8, by turns: medians, and how many times faster int8 is."""
    print(f"{'kernel':32} {'floats us':>10} {'int8 us':>10} {'ratio':>6}  of each round")
    for case in ATTENTION:
        pair = [attention(kernels, model, dtype, *case, storage) for storage in (None, ms.int8)]
        rounds = [[median_seconds(one.call) for one in pair] for _ in range(5)]
        floats, integers = (statistics.median(times) for times in zip(*rounds, strict=True))
        each = " ".join(f"{a / b:.2f}" for a, b in rounds)
        print(f"{pair[0].name:32} {floats * 1e6:10.1f} {integers * 1e6:10.1f} {floats / integers:6.2f}  {each}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-0.5b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--scheme", choices=SCHEMES, help="weights of small integers, products only (default: floats)")
    parser.add_argument("--cache", choices=("int8",), help="compare attention over such a cache with that over floats")
    parser.add_argument("--isa", help="instruction set (default: the best this machine has)")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    compat.absorb_numpy_warning()
    kernels = CpuKernels(options.isa)
    dtype = DTYPES[options.dtype]
    if options.cache:
        return compare_caches(kernels, options.model, dtype)
    kind = SCHEMES.get(options.scheme, dtype)
    peak = "bf16_gflop_s" if options.dtype == "bfloat16" and kernels.isa == "avx512_bf16" else "f32_gflop_s"
    if options.scheme == "w8a8":
        peak = "int8_gop_s"
    what = f"{options.model}, {options.scheme or 'floats'}, {options.dtype}, {kernels.describe()}"
    print(f"{what}; limits now: {limits.measure()}")
    print(f"{'kernel':32} {'rows':>5} {'us':>10} {'GB/s':>7} {'GFLOP/s':>8} {'of limit':>9}")
    table: list[Row] = []

    def show(cases: list[Case], rows: int) -> None:
        for row in judged(cases, rows, peak):
            table.append(row)
            line = f"{row.name:32} {rows:5} {row.microseconds:10.1f} {row.gb_s:7.1f} {row.gflop_s:8.1f}"
            print(f"{line} {row.of_limit:9.0%}")

    for rows in (1, 8, 32, 128, 1024):
        show(list(linears(kernels, options.model, dtype, kind, rows)), rows)
    for queries, context, sequences in () if options.scheme else ATTENTION:
        show([attention(kernels, options.model, dtype, queries, context, sequences)], queries * sequences)
    if options.json:
        with open(options.json, "w") as file:
            json.dump([asdict(row) for row in table], file, indent=2)


if __name__ == "__main__":
    main()
