"""Products with weights of small integers against NumPy; like test_reference.py they run on any back end."""

from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor

from tests.kernels import integers
from tests.kernels import references as ref
from tests.kernels.integers import DYNAMIC, STATIC, matrix
from tests.kernels.references import dtypes, examples, normal, seeds, to_array, to_tensor, widths
from vllm_ms_models.kernels import Integers, Kernels
from vllm_ms_models.kernels.reference import ReferenceKernels

FLOATS = [Integers(bits, size, "float") for bits in (8, 4) for size in (0, 16, 32, 48, 128)]
KINDS = [DYNAMIC, STATIC, *FLOATS]
kinds = st.sampled_from(KINDS)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return ReferenceKernels()


def check(got: Any, want: np.ndarray, error: np.ndarray, dtype: Any) -> None:
    """Finite values as `want`; where that is NaN, NaN."""
    np.testing.assert_array_equal(np.isnan(to_array(got)), np.isnan(want))
    finite = np.isfinite(want).all(1)
    values = to_tensor(to_array(got)[finite], dtype)
    assert got.dtype == dtype
    ref.assert_close(values, (want[finite], error[finite]), dtype)


@examples
@given(
    seed=seeds,
    kind=kinds,
    dtype=dtypes,
    tokens=ref.token_counts,
    sizes=ref.fused_sizes,
    width=widths,
    scale=ref.scales,
    biased=st.booleans(),
    zeros=st.booleans(),
    addends=st.booleans(),
    same_input=st.booleans(),
    out=st.one_of(st.none(), dtypes),
)
def test_linear_of_integers(
    kernels: Kernels,
    seed: int,
    kind: Integers,
    dtype: Any,
    tokens: int,
    sizes: list[int],
    width: int,
    scale: float,
    biased: bool,
    zeros: bool,
    addends: bool,
    same_input: bool,
    out: Any,
) -> None:
    rng = np.random.default_rng(seed)
    values = matrix(rng, kind, sizes, width, zeros, addends and kind.activations != "float", same_input)
    weight = values.load(kernels)
    assert (weight.sizes, weight.in_features, weight.dtype) == (tuple(sizes), width, ms.int8)
    assert weight.integers == kind
    x = normal(rng, (tokens, width), dtype, scale)
    bias = normal(rng, (sum(sizes),), ms.float32) if biased else None
    bias_tensor = None if bias is None else to_tensor(bias, ms.float32)
    want, error = integers.linear(x, values, bias)
    ref.assert_close(kernels.linear(to_tensor(x, dtype), weight, bias_tensor, out), (want, error), out or dtype)
    parts = kernels.linear_split(to_tensor(x, dtype), weight, bias_tensor)
    cuts = np.cumsum(sizes)[:-1]
    for part, *bounded in zip(parts, np.split(want, cuts, 1), np.split(error, cuts, 1), strict=True):
        assert part.is_contiguous()
        ref.assert_close(part, (bounded[0], bounded[1]), dtype)


@examples
@given(
    seed=seeds,
    kind=kinds,
    dtype=dtypes,
    tokens=ref.token_counts,
    size=st.sampled_from((1, 16, 23, 48, 70, 96, 200)),
    width=widths,
    biased=st.booleans(),
    zeros=st.booleans(),
    same_input=st.booleans(),
    gate=st.sampled_from(("silu", "gelu", "gelu_tanh")),
)
def test_linear_gated_of_integers(
    kernels: Kernels,
    seed: int,
    kind: Integers,
    dtype: Any,
    tokens: int,
    size: int,
    width: int,
    biased: bool,
    zeros: bool,
    same_input: bool,
    gate: str,
) -> None:
    rng = np.random.default_rng(seed)
    values = matrix(rng, kind, [size, size], width, zeros, False, same_input)
    x = normal(rng, (tokens, width), dtype)
    bias = normal(rng, (2 * size,), ms.float32) if biased else None
    bias_tensor = None if bias is None else to_tensor(bias, ms.float32)
    got = kernels.linear_gated(to_tensor(x, dtype), values.load(kernels), gate, bias_tensor)
    ref.assert_close(got, ref.gated_products(gate, *integers.linear(x, values, bias)), dtype)


@pytest.mark.parametrize("kind", [DYNAMIC, STATIC])
@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "rows", "width"), [(1, 5003, 900), (3, 64, 4864), (17, 300, 2051), (70, 1201, 900), (200, 130, 67)]
)
@pytest.mark.parametrize("zeros", [False, True])
def test_sums_of_integers_are_exact(
    kernels: Kernels, kind: Integers, dtype: Any, tokens: int, rows: int, width: int, zeros: bool
) -> None:
    """With scales that are powers of two nothing is rounded but the sum, once."""
    rng = np.random.default_rng(width)
    values = matrix(rng, kind, [rows], width, zeros, True)
    values = replace(
        values, scales=2.0 ** rng.integers(-9, 9, (rows, 1)).astype(np.float32), inputs=[(0.125, int(zeros) * 3)]
    )
    x = integers.exact_inputs(rng, tokens, width)
    assert np.array_equal(ref.rounded(x, dtype), x)
    q, scale = (
        integers.round_by_token if kind == DYNAMIC else lambda x: integers.round_by_input(x, *values.inputs[0])
    )(x)
    if kind == DYNAMIC:
        np.testing.assert_array_equal(q * scale, x)
    sums = q @ (values.values.astype(np.int64) - values.zeros).T + values.addends
    want = sums.astype(np.float32) * (scale * values.scales[:, 0])
    got = kernels.linear(to_tensor(x, dtype), values.load(kernels), dtype=ms.float32)
    np.testing.assert_array_equal(to_array(got), want)


@pytest.mark.parametrize("kind", [DYNAMIC, STATIC])
@pytest.mark.parametrize("activation", [-128, 127])
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_largest_sums(kernels: Kernels, kind: Integers, activation: int, value: int, tokens: int) -> None:
    """Every product as large as can be, in as long a row as models have; -128 only by a static input."""
    width, rows = 32768, 20
    values = np.full((rows, width), value, np.int8)
    zeros = np.full((rows, 1), 127 if value < 0 else -128, np.int8)
    weight = integers.Matrix(
        kind, [rows], values, np.ones((rows, 1), np.float32), zeros, np.full(rows, 12345, np.int32), [(1.0, 0)]
    )
    x = np.full((tokens, width), float(activation))
    q = max(activation, -127) if kind == DYNAMIC else activation
    scale = np.float32(abs(activation)) / np.float32(127) if kind == DYNAMIC else np.float32(1)
    want = np.float32(q * (value - int(zeros[0, 0])) * width + 12345) * scale
    got = kernels.linear(to_tensor(x, ms.float32), weight.load(kernels))
    np.testing.assert_array_equal(to_array(got), np.full((tokens, rows), want))


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("dtype", ref.DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 900), (2, 4864), (70, 900), (70, 4864)])
def test_linear_of_a_large_integer_weight(
    kernels: Kernels, kind: Integers, dtype: Any, tokens: int, width: int
) -> None:
    rng = np.random.default_rng(tokens)
    values = matrix(rng, kind, [1003, 200], width, zeros=tokens != 70)
    x = normal(rng, (tokens, width), dtype)
    got = kernels.linear(to_tensor(x, dtype), values.load(kernels), dtype=ms.float32)
    ref.assert_close(got, integers.linear(x, values), ms.float32)


@examples
@given(
    seed=seeds,
    kind=st.sampled_from([DYNAMIC, STATIC]),
    dtype=dtypes,
    tokens=ref.token_counts,
    width=widths,
    biased=st.booleans(),
)
def test_rows_that_are_not_finite_give_nan(
    kernels: Kernels, seed: int, kind: Integers, dtype: Any, tokens: int, width: int, biased: bool
) -> None:
    """And leave the other rows alone."""
    rng = np.random.default_rng(seed)
    values = matrix(rng, kind, [37, 5], width, zeros=True)
    x, bad = integers.poison(normal(rng, (tokens, width), dtype), rng)
    bias = normal(rng, (42,), ms.float32) if biased else None
    bias_tensor = None if bias is None else to_tensor(bias, ms.float32)
    array = ref.to_tensor(np.where(np.isfinite(x), x, 0.0), dtype)
    memory = to_array(array)
    memory[~np.isfinite(x)] = x[~np.isfinite(x)]
    tensor = Tensor(memory.astype(np.float32)).astype(dtype)
    want, error = integers.linear(x, values, bias)
    assert np.array_equal(np.isnan(want).all(1), bad)
    check(kernels.linear(tensor, values.load(kernels), bias_tensor), want, error, dtype)


@pytest.mark.parametrize("kind", [DYNAMIC, STATIC])
def test_rows_of_the_largest_and_smallest_numbers(kernels: Kernels, kind: Integers) -> None:
    """A row whose largest magnitude has no inverse is 0; what exceeds a static input's range is clipped."""
    x = np.zeros((6, 20))
    x[0, 3], x[1, 2], x[2, 5], x[3, :] = 3e38, 1e-36, -1e-38, np.finfo(np.float32).max
    x[4, :2] = 3e38, -3e38
    rng = np.random.default_rng(1)
    values = replace(
        matrix(rng, kind, [33], 20), scales=np.full((33, 1), 2.0**-20, np.float32), inputs=[(2.0**-10, 100)]
    )
    want, error = integers.linear(x, values)
    got = kernels.linear(to_tensor(x, ms.float32), values.load(kernels))
    ref.assert_close(got, (want, error), ms.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_integers_loaded_in_pieces(kernels: Kernels, kind: Integers) -> None:
    """Strided, read-only pieces, in any order; the rows that nobody loaded give the bias."""
    rng = np.random.default_rng(3)
    values = matrix(rng, kind, [40, 23], 130, zeros=True)
    weight = kernels.new_integer_weight(values.sizes, 130, kind)
    loaded = np.zeros(63, np.bool_)
    for part, first, last in ((1, 5, 20), (0, 17, 40), (0, 2, 17), (1, 0, 5), (1, 20, 20)):
        rows = slice(40 * part + first, 40 * part + last)
        wide = np.zeros((last - first, 300), np.int8)
        wide[:, 100:230] = values.values[rows]
        wide.flags.writeable = False
        kernels.load_integers(weight, part, first, wide[:, 100:230])
        kernels.load_scales(weight, part, first, values.scales[rows], values.zeros[rows])
        loaded[rows] = True
    for part in range(2 if kind == STATIC else 0):
        kernels.set_input(weight, part, *values.inputs[part])
    x, bias = normal(rng, (5, 130), ms.float32), normal(rng, (63,), ms.float32)
    want, error = integers.linear(x, values, bias)
    want[:, ~loaded], error[:, ~loaded] = bias[~loaded], 0
    got = kernels.linear(to_tensor(x, ms.float32), weight, to_tensor(bias, ms.float32))
    ref.assert_close(got, (want, error), ms.float32)


@pytest.mark.parametrize("kind", [DYNAMIC, STATIC, Integers(8, 0, "float"), Integers(4, 16, "float")])
def test_integers_that_do_not_fit_are_refused(kernels: Kernels, kind: Integers) -> None:
    weight, floats = kernels.new_integer_weight([3, 5], 20, kind), kernels.new_weight([3, 5], 20, ms.float32)
    groups = kind.groups(20)
    values, scales = np.zeros((2, 20), np.int8), np.ones((2, groups), np.float32)
    x = to_tensor(np.ones((2, 20)), ms.float32)
    for call in (
        lambda: kernels.load_integers(weight, 2, 0, values),
        lambda: kernels.load_integers(weight, 0, 2, values),
        lambda: kernels.load_integers(weight, 1, -1, values),
        lambda: kernels.load_integers(weight, 0, 0, values[:, 1:]),
        lambda: kernels.load_integers(weight, 0, 0, values.astype(np.int16)),
        lambda: kernels.load_integers(floats, 0, 0, values),
        lambda: kernels.load_rows(weight, 0, 0, values.astype(np.float32)),
        lambda: kernels.load_scales(weight, 0, 2, scales),
        lambda: kernels.load_scales(weight, 0, 0, scales.astype(np.float64)),
        lambda: kernels.load_scales(weight, 0, 0, np.ones((2, groups + 1), np.float32)),
        lambda: kernels.load_scales(weight, 0, 0, scales, np.zeros((1, groups), np.int8)),
        lambda: kernels.load_scales(weight, 0, 0, scales, None, np.zeros(3, np.int32)),
        lambda: kernels.load_scales(floats, 0, 0, scales),
        lambda: kernels.set_input(weight, 2, 1.0, 0),
        lambda: kernels.set_input(weight, 0, 0.0, 0),
        lambda: kernels.set_input(weight, 0, 1.0, 128),
        lambda: kernels.set_input(floats, 0, 1.0, 0),
        lambda: kernels.embedding(Tensor(np.arange(2)), weight),
        lambda: kernels.linear(to_tensor(np.ones((2, 21)), ms.float32), weight),
        lambda: kernels.linear_gated(x, weight, "silu"),
    ):
        with pytest.raises(ValueError):
            call()
    if kind.bits == 4:
        with pytest.raises(ValueError, match="does not fit 4 bits"):
            kernels.load_integers(weight, 0, 0, values + np.int8(8))


@pytest.mark.parametrize(
    ("bits", "group_size", "activations"),
    [(2, 0, "float"), (8, 24, "float"), (8, -16, "float"), (4, 0, "dynamic"), (8, 32, "static"), (8, 0, "int8")],
)
def test_other_integers_are_refused(bits: int, group_size: int, activations: Any) -> None:
    with pytest.raises(ValueError, match=r"not supported|need weights|cannot be"):
        Integers(bits, group_size, activations)


def test_no_inputs_at_all(kernels: Kernels) -> None:
    for kind in KINDS:
        weight = kernels.new_integer_weight([3, 3], 0, kind)
        got = kernels.linear(to_tensor(np.ones((2, 0)), ms.float32), weight, to_tensor(np.arange(6.0), ms.float32))
        np.testing.assert_array_equal(to_array(got), np.tile(np.arange(6.0), (2, 1)))
