"""Products with low-rank adapters against float64, and what they must leave as it is.

With u = 2^-24, `k` inputs and rank `r`, a value is a sum of k products, of the bias, and of r products with what are
sums of k products times a scale: it is off by at most (2 k + r + 6) u times the sum of all magnitudes.
"""

from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor

from tests.kernels import references as ref
from tests.kernels.references import UNIT, dtypes, examples, make_weight, normal, seeds, to_array, to_tensor, widths
from vllm_ms_models.kernels import Addend, Kernels, LowRank
from vllm_ms_models.kernels.reference import ReferenceKernels


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return ReferenceKernels()


class Adapter:
    """Random matrices for parts of `sizes`, as they are and as the kernels keep them."""

    def __init__(
        self, kernels: Kernels, rng: np.random.Generator, sizes: list[int], width: int, ranks: list[int], dtype: Any
    ) -> None:
        self.ranks, self.sizes, self.width = ranks, sizes, width
        self.down = [normal(rng, (rank, width), dtype) for rank in ranks]
        self.up = [normal(rng, (size, rank), dtype, 0.3) for size, rank in zip(sizes, ranks, strict=True)]
        self.scales = tuple(float(np.float32(scale)) for scale in rng.uniform(0.2, 3, len(ranks)))
        most = max(ranks)
        wide = [np.pad(up, ((0, 0), (0, most - rank))) for up, rank in zip(self.up, ranks, strict=True)]
        self.kept = LowRank(
            make_weight(kernels, np.concatenate(self.down), ranks, dtype),
            make_weight(kernels, np.concatenate(wide), sizes, dtype),
            self.scales,
        )

    def products(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is added to each row, and its magnitude."""
        both = []
        for values in (np.asarray, np.abs):
            parts = [
                scale * (values(x) @ values(down).T) @ values(up).T
                for down, up, scale in zip(self.down, self.up, self.scales, strict=True)
            ]
            both.append(np.concatenate(parts, 1))
        return both[0], both[1]


def expected(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, rows: np.ndarray, adapters: list[Adapter | None]
) -> tuple[np.ndarray, np.ndarray]:
    values, error = ref.linear(x, weight, bias)
    magnitude = error / ((x.shape[1] + 2) * UNIT)
    for number, adapter in enumerate(adapters):
        if adapter is not None:
            added, size = adapter.products(x[rows == number])
            values[rows == number] += added
            magnitude[rows == number] += size
    most = max((max(adapter.ranks) for adapter in adapters if adapter), default=0)
    return values, (2 * x.shape[1] + most + 6) * UNIT * magnitude


def some_adapters(
    kernels: Kernels, rng: np.random.Generator, sizes: list[int], width: int, dtype: Any, data: Any
) -> list[Adapter | None]:
    """None among them has no matrices for this linear; ranks differ from part to part, and may be 0."""
    ranks = st.lists(st.sampled_from((0, 1, 2, 5, 8, 16, 17)), min_size=len(sizes), max_size=len(sizes)).filter(any)
    drawn = data.draw(st.lists(st.one_of(st.none(), ranks), min_size=1, max_size=4).filter(any), label="ranks")
    return [Adapter(kernels, rng, sizes, width, each, dtype) if each else None for each in drawn]


def reduce(kernels: Kernels, x: Tensor, rows: np.ndarray, adapters: list[Adapter | None]) -> Addend:
    return kernels.reduce(x, Tensor(rows.astype(np.int32)), [adapter.kept if adapter else None for adapter in adapters])


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    own_dtype=st.one_of(st.none(), dtypes),
    tokens=st.sampled_from((0, 1, 3, 9, 20, 70)),
    sizes=ref.fused_sizes,
    width=widths,
    biased=st.booleans(),
    data=st.data(),
)
def test_linear_with_adapters(
    kernels: Kernels,
    seed: int,
    dtype: Any,
    own_dtype: Any,
    tokens: int,
    sizes: list[int],
    width: int,
    biased: bool,
    data: Any,
) -> None:
    """Rows of several adapters and of none in any order, `linear` and `linear_split`; adapters of another dtype."""
    rng = np.random.default_rng(seed)
    adapters = some_adapters(kernels, rng, sizes, width, own_dtype or dtype, data)
    values, x = normal(rng, (sum(sizes), width), dtype), normal(rng, (tokens, width), dtype)
    bias = normal(rng, (sum(sizes),), ms.float32) if biased else None
    rows = rng.integers(-1, len(adapters), tokens)
    if data.draw(st.booleans(), label="in runs"):
        rows = np.sort(rows)
    weight, tensor = make_weight(kernels, values, sizes, dtype), to_tensor(x, dtype)
    bias_tensor = None if bias is None else to_tensor(bias, ms.float32)
    addend = reduce(kernels, tensor, rows, adapters)
    want, error = expected(x, values, bias, rows, adapters)
    ref.assert_close(kernels.linear(tensor, weight, bias_tensor, None, addend), (want, error), dtype)
    wide = kernels.linear(tensor, weight, bias_tensor, ms.float32, addend)
    ref.assert_close(wide, (want, error), ms.float32)
    cuts = np.cumsum(sizes)[:-1]
    split = kernels.linear_split(tensor, weight, bias_tensor, addend)
    for part, *bounded in zip(split, np.split(want, cuts, 1), np.split(error, cuts, 1), strict=True):
        ref.assert_close(part, (bounded[0], bounded[1]), dtype)


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    tokens=st.sampled_from((1, 3, 20, 70)),
    size=st.sampled_from((1, 16, 23, 96)),
    width=widths,
    kind=st.sampled_from(("silu", "gelu", "gelu_tanh")),
    data=st.data(),
)
def test_gated_with_adapters(
    kernels: Kernels, seed: int, dtype: Any, tokens: int, size: int, width: int, kind: str, data: Any
) -> None:
    """Gate and up get their summands before they are activated and multiplied."""
    rng = np.random.default_rng(seed)
    adapters = some_adapters(kernels, rng, [size, size], width, dtype, data)
    values, x = normal(rng, (2 * size, width), dtype, 0.3), normal(rng, (tokens, width), dtype, 0.3)
    rows = rng.integers(-1, len(adapters), tokens)
    tensor = to_tensor(x, dtype)
    addend = reduce(kernels, tensor, rows, adapters)
    got = kernels.linear_gated(tensor, make_weight(kernels, values, [size, size], dtype), kind, None, addend)
    ref.assert_close(got, ref.gated_products(kind, *expected(x, values, None, rows, adapters)), dtype)


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 33, 200])
def test_a_row_does_not_depend_on_the_others(kernels: Kernels, dtype: Any, tokens: int) -> None:
    """Bit by bit: without an adapter, as in a plain batch; with one, as alone. `reduce` is exact about rows too."""
    if kernels.name == "reference":
        pytest.skip("MindSpore's products of one row and of several differ in the last bit")
    rng = np.random.default_rng(tokens)
    sizes, width = [40, 40], 96
    adapters: list[Adapter | None] = [
        Adapter(kernels, rng, sizes, width, ranks, dtype) for ranks in ([4, 4], [16, 0], [3, 9])
    ]
    values, x = normal(rng, (80, width), dtype), normal(rng, (tokens, width), dtype)
    rows = rng.integers(-1, 3, tokens)
    weight, tensor = make_weight(kernels, values, sizes, dtype), to_tensor(x, dtype)
    addend = reduce(kernels, tensor, rows, adapters)
    plain = to_array(kernels.linear_gated(tensor, weight, "silu"))
    mixed = to_array(kernels.linear_gated(tensor, weight, "silu", None, addend))
    np.testing.assert_array_equal(mixed[rows < 0], plain[rows < 0])
    for row in range(min(tokens, 20)):
        alone = to_tensor(x[row : row + 1], dtype)
        own = reduce(kernels, alone, rows[row : row + 1], adapters)
        got = to_array(kernels.linear_gated(alone, weight, "silu", None, own))
        np.testing.assert_array_equal(got[0], mixed[row])


def test_what_does_not_fit_is_refused(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    adapter = Adapter(kernels, rng, [5, 3], 8, [2, 4], ms.float32)
    x = to_tensor(normal(rng, (2, 8), ms.float32), ms.float32)
    with pytest.raises(ValueError, match="adapter 1; there are 1"):
        reduce(kernels, x, np.array([0, 1]), [adapter])
    with pytest.raises(ValueError):
        reduce(kernels, to_tensor(np.zeros((2, 7)), ms.float32), np.array([0, 0]), [adapter])
    if kernels.name == "reference":
        return
    addend = reduce(kernels, x, np.array([0, -1]), [adapter])
    for sizes in ([5], [3, 5], [5, 3, 1]):
        weight = make_weight(kernels, np.zeros((sum(sizes), 8)), sizes, ms.float32)
        with pytest.raises(ValueError, match="dapter"):
            kernels.linear(x, weight, None, None, addend)
    weight = make_weight(kernels, np.zeros((8, 8)), [5, 3], ms.float32)
    short = replace(addend, rows=Tensor(np.zeros(1, np.int32)))
    with pytest.raises(ValueError, match=r"rows has shape"):
        kernels.linear(x, weight, None, None, short)
    narrow = replace(addend, reduced=Tensor(np.zeros((2, 4), np.float32)))
    with pytest.raises(ValueError, match="rank 4 does not fit"):
        kernels.linear(x, weight, None, None, narrow)
