"""Experts, routings and adapters to try the back ends on."""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tests.ascend.steps import numpy_of, weight_of
from vllm_ms_models.kernels import Integers, Kernels, LowRank, Routing, Weight

# Name -> (routing, experts, has a bias, the operator that chooses).
ROUTINGS: dict[str, tuple[Routing, int, bool, str]] = {
    "Qwen3-MoE": (Routing(4, True), 16, False, "softmax_top_k"),
    "Mixtral, not renormalized": (Routing(2), 8, False, "softmax_top_k"),
    "DeepSeek-V2": (Routing(6, False, "softmax", 16.0, 8, 3, "max"), 32, False, "top_k"),
    "DeepSeek-V3": (Routing(8, True, "sigmoid", 2.5, 8, 4, "top2"), 256, True, "sigmoid_group_top_k"),
    "DeepSeek-V3, small": (Routing(2, True, "sigmoid", 2.5, 1, 1, "top2"), 8, True, "sigmoid_group_top_k"),
    "not renormalized": (Routing(4, False, "sigmoid", 1.5, 4, 2, "top2"), 16, True, "top_k"),
    "more experts than the operator has": (Routing(8, True, "sigmoid", 2.8, 1, 1, "top2"), 384, True, "top_k"),
    "softmax with a bias": (Routing(3, True), 8, True, "top_k"),
}
# How experts are stored: "static" has an input for each expert, "mixed" others for gate and up; of weights for floats
# "w4a16" alone has no zero points.
KINDS: dict[str, Integers | None] = {
    "floats": None,
    "dynamic": Integers(8, 0, "dynamic"),
    "static": Integers(8, 0, "static"),
    "mixed": Integers(8, 0, "static"),
    "w8a16": Integers(8, 0, "float"),
    "w8a16 in groups": Integers(8, 32, "float"),
    "w4a16": Integers(4, 32, "float"),
    "w4a16, zero points": Integers(4, 32, "float"),
    "w4a16, by output": Integers(4, 0, "float"),
}


def integer_weight(
    kernels: Kernels,
    rng: np.random.Generator,
    integers: Integers,
    sizes: Sequence[int],
    inputs: int,
    zeros: bool = False,
    static: Sequence[tuple[float, int]] = (),
) -> Weight:
    """Random integers; products with rows about 1 are about 1."""
    weight = kernels.new_integer_weight(sizes, inputs, integers)
    half, groups = 1 << (integers.bits - 1), integers.groups(inputs)
    for part, size in enumerate(sizes):
        kernels.load_integers(weight, part, 0, rng.integers(-half, half, (size, inputs)).astype(np.int8))
        scales = (rng.uniform(1, 2, (size, groups)) / half / inputs**0.5).astype(np.float32)
        points = rng.integers(-half, half, (size, groups)).astype(np.int8) if zeros else None
        addends = rng.integers(-500, 500, size).astype(np.int32) if static else None
        if static:
            scales *= np.float32(static[part][0])
        kernels.load_scales(weight, part, 0, scales, points, addends)
        if static:
            kernels.set_input(weight, part, *static[part])
    return weight


def experts_of(
    kernels: Kernels, kind: str, seed: int, experts: int, width: int, size: int, dtype: Any
) -> tuple[list[Weight], list[Weight]]:
    """Gate and up, and down, of each expert: the same numbers in every back end."""
    rng = np.random.default_rng(seed)
    gate_up: list[Weight] = []
    down: list[Weight] = []
    for _ in range(experts):
        for target, sizes, inputs in ((gate_up, [size, size], width), (down, [width], size)):
            integers = KINDS[kind]
            if integers is None:
                target.append(weight_of(kernels, rng.normal(size=(sum(sizes), inputs)) / inputs**0.5, sizes, dtype))
                continue
            static = [(2.0 ** -int(rng.integers(4, 6)), 2 * int(rng.integers(-4, 5)))] * len(sizes)
            if kind == "mixed" and len(sizes) == 2:
                static[1] = (2.0**-6, 4)
            given = static if integers.activations == "static" else ()
            zeros = integers.activations == "float" and kind != "w4a16"
            target.append(integer_weight(kernels, rng, integers, sizes, inputs, zeros, given))
    return gate_up, down


def choices(rng: np.random.Generator, tokens: int, top_k: int, experts: int, first: int) -> tuple[Tensor, Tensor]:
    """Ids, some of experts of other ranks on both sides, none twice for a token; and shares."""
    ids = np.argsort(rng.random((tokens, experts + 4)), -1)[:, :top_k] + first - 2
    return Tensor(ids.astype(np.int32)), Tensor(rng.uniform(0.1, 1, ids.shape).astype(np.float32))


def adapter_of(
    kernels: Kernels, rng: np.random.Generator, sizes: Sequence[int], width: int, ranks: Sequence[int], dtype: Any
) -> LowRank:
    down = rng.normal(size=(sum(ranks), width)) / width**0.5
    up = np.zeros((sum(sizes), max(ranks)))
    for rows, rank in zip(np.split(up, np.cumsum(sizes)[:-1]), ranks, strict=True):
        rows[:, :rank] = rng.normal(size=(len(rows), rank)) / max(rank, 1) ** 0.5
    scales = tuple(float(np.float32(scale)) for scale in rng.uniform(0.2, 3, len(ranks)))
    return LowRank(weight_of(kernels, down, list(ranks), dtype), weight_of(kernels, up, list(sizes), dtype), scales)


def rows_of(rng: np.random.Generator, tokens: int, adapters: int) -> Tensor:
    """Which adapter each token has, -1 for none."""
    return Tensor(rng.integers(-1, adapters, tokens).astype(np.int32))


def float32(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = ms.float32) -> Tensor:
    """Float32 numbers that `dtype` holds."""
    return Tensor(rng.normal(size=shape).astype(numpy_of(dtype)).astype(np.float32))
