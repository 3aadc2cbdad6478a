"""Every kernel against its float64 definition.

The tests take their back end from the fixture `kernels`: a module that imports them and has a `kernels` of its own
runs them all on another back end.
"""

from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor, ops

from tests.kernels import references as ref
from tests.kernels.references import NUMPY, dtypes, examples, make_weight, normal, seeds, to_array, to_tensor, widths
from vllm_ms_models.kernels import Kernels
from vllm_ms_models.kernels.reference import ReferenceKernels


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return ReferenceKernels()


# --- weights ---------------------------------------------------------------------------------------------------


@examples
@given(seed=seeds, dtype=dtypes, source_dtype=dtypes, sizes=ref.fused_sizes, width=widths, data=st.data())
def test_load_rows_in_pieces(
    kernels: Kernels, seed: int, dtype: Any, source_dtype: Any, sizes: list[int], width: int, data: Any
) -> None:
    """Pieces of strided read-only arrays land in their rows, rounded to nearest even; the others stay zero."""
    rng = np.random.default_rng(seed)
    weight = kernels.new_weight(sizes, width, dtype)
    want = np.zeros((sum(sizes), width))
    for part, size in enumerate(sizes):
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))
        middle = data.draw(st.integers(first, last))
        for begin, end in ((middle, last), (first, middle)):
            whole = normal(rng, (3 * (end - begin), width + 5), source_dtype).astype(NUMPY[source_dtype])
            source = whole[1::3, 2 : 2 + width]
            source.flags.writeable = False
            kernels.load_rows(weight, part, begin, source)
            start = sum(sizes[:part])
            want[start + begin : start + end] = ref.rounded(source.astype(np.float64), dtype)
    assert (weight.sizes, weight.in_features, weight.dtype) == (tuple(sizes), width, dtype)
    rows = kernels.embedding(Tensor(np.arange(len(want))), weight)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(to_array(rows), want)


@pytest.mark.parametrize("dtype", [ms.bfloat16, ms.float16])
@pytest.mark.parametrize("source_dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_load_rows_rounds_to_nearest_even(kernels: Kernels, dtype: Any, source_dtype: Any) -> None:
    """Ties, subnormal numbers, and what is too large for float16."""
    digits = ref.DIGITS[dtype]
    ties = (1.0 + (np.arange(16) + 0.5) * 2.0 ** (1 - digits))[:, None] * np.array([1.0, -1.0])
    small = 2.0**-24 * np.arange(1, 33).reshape(16, 2) / 4
    large = np.linspace(65472, 65536, 32).reshape(16, 2)
    with np.errstate(over="ignore"):
        source = np.concatenate((ties, small, large), 1).astype(source_dtype)
    weight = kernels.new_weight([16], 6, dtype)
    kernels.load_rows(weight, 0, 0, source)
    got = to_array(kernels.embedding(Tensor(np.arange(16)), weight))
    np.testing.assert_array_equal(got, ref.rounded(source.astype(np.float64), dtype))


def test_load_rows_of_a_file(kernels: Kernels, tmp_path: Any) -> None:
    """A rank's columns of a memory-mapped matrix."""
    values = normal(np.random.default_rng(0), (7, 24), ms.bfloat16)
    values.astype(ml_dtypes.bfloat16).tofile(tmp_path / "matrix")
    source = np.memmap(tmp_path / "matrix", np.uint16, "r", shape=(7, 24)).view(ml_dtypes.bfloat16)
    weight = kernels.new_weight([7], 11, ms.float32)
    kernels.load_rows(weight, 0, 0, source[:, 12:23])
    np.testing.assert_array_equal(to_array(kernels.embedding(Tensor(np.arange(7)), weight)), values[:, 12:23])


@pytest.mark.parametrize(
    ("part", "first_row", "shape"), [(2, 0, (1, 4)), (-1, 0, (1, 4)), (0, 2, (2, 4)), (1, -1, (2, 4)), (0, 0, (1, 5))]
)
def test_load_rows_refuses_what_does_not_fit(
    kernels: Kernels, part: int, first_row: int, shape: tuple[int, int]
) -> None:
    weight = kernels.new_weight([3, 5], 4, ms.float32)
    with pytest.raises(ValueError):
        kernels.load_rows(weight, part, first_row, np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16, ms.float16])
@pytest.mark.parametrize("shape", [(9, 5), (9, 2, 3)])
def test_take_rows(kernels: Kernels, dtype: Any, shape: tuple[int, ...]) -> None:
    values = normal(np.random.default_rng(0), shape, dtype)
    for rows in (np.array([8, 0, 3, 3]), np.array([], np.int64)):
        taken = kernels.take_rows(to_tensor(values, dtype), rows)
        assert taken.dtype == dtype
        np.testing.assert_array_equal(to_array(taken), values[rows])


# --- dense -----------------------------------------------------------------------------------------------------


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    tokens=ref.token_counts,
    sizes=ref.fused_sizes,
    width=widths,
    scale=ref.scales,
    biased=st.booleans(),
    out=st.one_of(st.none(), dtypes),
)
def test_linear(
    kernels: Kernels,
    seed: int,
    dtype: Any,
    tokens: int,
    sizes: list[int],
    width: int,
    scale: float,
    biased: bool,
    out: Any,
) -> None:
    rng = np.random.default_rng(seed)
    values, x = normal(rng, (sum(sizes), width), dtype), normal(rng, (tokens, width), dtype, scale)
    bias = normal(rng, (sum(sizes),), ms.float32) if biased else None
    weight = make_weight(kernels, values, sizes, dtype)
    tensor, bias_tensor = to_tensor(x, dtype), None if bias is None else to_tensor(bias, ms.float32)
    want, error = ref.linear(x, values, bias)
    ref.assert_close(kernels.linear(tensor, weight, bias_tensor, out), (want, error), out or dtype)
    parts = kernels.linear_split(tensor, weight, bias_tensor)
    assert len(parts) == len(sizes)
    cuts = np.cumsum(sizes)[:-1]
    for part, *bounded in zip(parts, np.split(want, cuts, 1), np.split(error, cuts, 1), strict=True):
        assert part.is_contiguous()
        ref.assert_close(part, (bounded[0], bounded[1]), dtype)


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    tokens=ref.token_counts,
    size=st.sampled_from((1, 16, 23, 48, 70, 96, 200)),
    width=widths,
    biased=st.booleans(),
    kind=st.sampled_from(("silu", "gelu", "gelu_tanh", "clamped_swiglu")),
)
def test_linear_gated(
    kernels: Kernels, seed: int, dtype: Any, tokens: int, size: int, width: int, biased: bool, kind: str
) -> None:
    """The products are not rounded before they are gated: one rounding in all."""
    rng = np.random.default_rng(seed)
    values, x = normal(rng, (2 * size, width), dtype), normal(rng, (tokens, width), dtype)
    bias = normal(rng, (2 * size,), ms.float32) if biased else None
    weight = make_weight(kernels, values, [size, size], dtype)
    bias_tensor = None if bias is None else to_tensor(bias, ms.float32)
    got = kernels.linear_gated(to_tensor(x, dtype), weight, kind, bias_tensor)
    ref.assert_close(got, ref.linear_gated(kind, x, values, bias), dtype)


@pytest.mark.parametrize("dtype", ref.DTYPES)
@pytest.mark.parametrize("tokens", [1, 70])
def test_linear_of_a_large_weight(kernels: Kernels, dtype: Any, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    values, x = normal(rng, (5003, 900), dtype), normal(rng, (tokens, 900), dtype)
    weight = make_weight(kernels, values, [5003], dtype)
    got = kernels.linear(to_tensor(x, dtype), weight, dtype=ms.float32)
    ref.assert_close(got, ref.linear(x, values), ms.float32)


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    ids_dtype=st.sampled_from((np.int32, np.int64)),
    tokens=ref.token_counts,
    rows=widths,
    width=widths,
    first_row=st.sampled_from((0, 1, 1000)),
)
def test_embedding(
    kernels: Kernels, seed: int, dtype: Any, ids_dtype: Any, tokens: int, rows: int, width: int, first_row: int
) -> None:
    rng = np.random.default_rng(seed)
    values = normal(rng, (rows, width), dtype)
    weight = make_weight(kernels, values, [rows], dtype)
    ids = rng.integers(max(0, first_row - rows), first_row + 2 * rows, tokens).astype(ids_dtype)
    got = kernels.embedding(Tensor(ids), weight, first_row)
    assert got.dtype == dtype
    np.testing.assert_array_equal(to_array(got), ref.embedding(ids, values, first_row))


# --- elementwise -----------------------------------------------------------------------------------------------


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    shape=st.tuples(ref.token_counts, widths),
    scale=ref.scales,
    heads=st.sampled_from((None, 3)),
    flat=st.booleans(),
)
def test_rms_norm(
    kernels: Kernels, seed: int, dtype: Any, shape: tuple[int, int], scale: float, heads: int | None, flat: bool
) -> None:
    """`flat`: heads side by side are told by the size of the weight."""
    rng = np.random.default_rng(seed)
    x = normal(rng, shape if heads is None else (shape[0], heads, shape[1]), dtype, scale)
    weight = normal(rng, shape[1:], ms.float32)
    given, want = x, ref.rms_norm(x, weight, 1e-6)
    if flat:
        features = x.shape[-1] * (heads or 1)
        given, want = x.reshape(-1, features), (want[0].reshape(-1, features), want[1].reshape(-1, features))
    got = kernels.rms_norm(to_tensor(given, dtype), to_tensor(weight, ms.float32), 1e-6)
    ref.assert_close(got, want, dtype)


@examples
@given(seed=seeds, dtype=dtypes, shape=st.tuples(ref.token_counts, widths), scale=ref.scales)
def test_add_rms_norm(kernels: Kernels, seed: int, dtype: Any, shape: tuple[int, int], scale: float) -> None:
    rng = np.random.default_rng(seed)
    x, residual, weight = (
        normal(rng, shape, dtype, scale),
        normal(rng, shape, dtype),
        normal(rng, shape[1:], ms.float32),
    )
    x_tensor, tensor = to_tensor(x, dtype), to_tensor(residual, dtype)
    normed, same = kernels.add_rms_norm(x_tensor, tensor, to_tensor(weight, ms.float32), 1e-5)
    ref.assert_close(tensor, (x + residual, ref.UNIT * np.abs(x + residual)), dtype)
    np.testing.assert_array_equal(to_array(same), to_array(tensor))
    ref.assert_close(normed, ref.rms_norm(to_array(tensor), weight, 1e-5), dtype)
    np.testing.assert_array_equal(to_array(x_tensor), x)


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    shape=st.tuples(ref.token_counts, widths),
    scale=ref.scales,
    middle=st.sampled_from((0.0, 3.0)),
)
def test_layer_norm(
    kernels: Kernels, seed: int, dtype: Any, shape: tuple[int, int], scale: float, middle: float
) -> None:
    rng = np.random.default_rng(seed)
    x = normal(rng, shape, dtype, scale)
    x = ref.rounded(x + middle * scale, dtype)
    weight, bias = normal(rng, shape[1:], ms.float32), normal(rng, shape[1:], ms.float32)
    tensors = to_tensor(x, dtype), to_tensor(weight, ms.float32), to_tensor(bias, ms.float32)
    ref.assert_close(kernels.layer_norm(*tensors, 1e-5), ref.layer_norm(x, weight, bias, 1e-5), dtype)


@examples
@given(seed=seeds, dtype=dtypes, shape=st.tuples(ref.token_counts, widths), scale=ref.scales)
def test_add_layer_norm(kernels: Kernels, seed: int, dtype: Any, shape: tuple[int, int], scale: float) -> None:
    rng = np.random.default_rng(seed)
    x, residual = normal(rng, shape, dtype, scale), normal(rng, shape, dtype)
    weight, bias = (normal(rng, shape[1:], ms.float32) for _ in range(2))
    x_tensor, tensor = to_tensor(x, dtype), to_tensor(residual, dtype)
    parameters = to_tensor(weight, ms.float32), to_tensor(bias, ms.float32)
    normed, same = kernels.add_layer_norm(x_tensor, tensor, *parameters, 1e-5)
    ref.assert_close(tensor, (x + residual, ref.UNIT * np.abs(x + residual)), dtype)
    np.testing.assert_array_equal(to_array(same), to_array(tensor))
    ref.assert_close(normed, ref.layer_norm(to_array(tensor), weight, bias, 1e-5), dtype)
    np.testing.assert_array_equal(to_array(x_tensor), x)


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    shape=st.tuples(ref.token_counts, widths),
    scale=ref.scales,
    kind=st.sampled_from(("silu", "gelu", "gelu_tanh", "quick_gelu", "relu")),
)
def test_activations(kernels: Kernels, seed: int, dtype: Any, shape: tuple[int, int], scale: float, kind: str) -> None:
    x = normal(np.random.default_rng(seed), shape, dtype, scale)
    ref.assert_close(kernels.activate(to_tensor(x, dtype), kind), ref.activated(kind, x), dtype)


@examples
@given(
    seed=seeds,
    dtype=dtypes,
    shape=st.tuples(ref.token_counts, widths),
    scale=ref.scales,
    kind=st.sampled_from(("silu", "gelu", "gelu_tanh")),
)
def test_gated_activations(
    kernels: Kernels, seed: int, dtype: Any, shape: tuple[int, int], scale: float, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    gate, up = normal(rng, shape, dtype, scale), normal(rng, shape, dtype)
    tensors = to_tensor(gate, dtype), to_tensor(up, dtype)
    got = kernels.silu_and_mul(*tensors) if kind == "silu" else kernels.gelu_and_mul(*tensors, kind == "gelu_tanh")
    ref.assert_close(got, ref.gated(kind, gate, up), dtype)


# --- in general ------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_refused(kernels: Kernels) -> None:
    weight, ones = kernels.new_weight([3], 4, ms.float32), to_tensor(np.ones(4), ms.float32)
    x, wide = to_tensor(np.ones((2, 4)), ms.float32), to_tensor(np.ones((2, 5)), ms.float32)
    cache = to_tensor(np.zeros(kernels.cache_shape(2, 16, 1, 4)), ms.float32)
    for call in (
        lambda: kernels.linear(wide, weight),
        lambda: kernels.linear_split(wide, weight),
        lambda: kernels.linear_gated(x, weight, "silu"),
        lambda: kernels.linear_gated(x, kernels.new_weight([3, 3], x.shape[1], ms.float32), "relu"),
        lambda: kernels.rms_norm(wide, ones, 1e-6),
        lambda: kernels.add_rms_norm(x, wide, ones, 1e-6),
        lambda: kernels.layer_norm(wide, ones, ones, 1e-6),
        lambda: kernels.layer_norm(x, ones, to_tensor(np.ones(5), ms.float32), 1e-6),
        lambda: kernels.add_layer_norm(x, wide, ones, ones, 1e-6),
        lambda: kernels.activate(x, "tanh"),
        lambda: kernels.silu_and_mul(x, wide),
        lambda: kernels.gelu_and_mul(x, wide, True),
        lambda: kernels.rotary(x, x, Tensor(np.arange(2)), to_tensor(np.ones((2, 6)), ms.float32), 4, False),
        lambda: kernels.write_kv(x, x, cache, Tensor(np.arange(3))),
        lambda: kernels.write_kv(x, x, to_tensor(to_array(cache), ms.float16), Tensor(np.arange(2))),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("dtype", ref.DTYPES)
def test_memory_shared_with_torch_changes_in_place(kernels: Kernels, dtype: Any) -> None:
    """What torch gave by DLPack: the residual stream, queries and keys."""
    rng = np.random.default_rng(0)
    ones = to_tensor(np.ones(12), ms.float32)
    x = normal(rng, (3, 12), dtype)
    original, residual = ref.shared(x, dtype)
    kernels.add_rms_norm(to_tensor(x, dtype), residual, ones, 1e-6)
    np.testing.assert_array_equal(original.to(torch.float64).numpy(), 2 * x)
    (query_original, query), (key_original, key) = ref.shared(x, dtype), ref.shared(x, dtype)
    half_turn = to_tensor(np.repeat([[-1.0, 0.0]], 2, 1), ms.float32)
    kernels.rotary(query, key, Tensor(np.zeros(3, np.int64)), half_turn, 4, False)
    for rotated in (query_original, key_original):
        np.testing.assert_array_equal(rotated.to(torch.float64).numpy(), -x)


@pytest.mark.parametrize("dtype", ref.DTYPES)
def test_kernels_read_what_operators_and_torch_wrote(kernels: Kernels, dtype: Any) -> None:
    """No stale copy on either side: operators, kernels and torch take turns on the same memory."""
    ones = to_tensor(np.ones(4), ms.float32)
    original, shared = ref.shared(np.zeros((2, 4)), dtype)
    step = to_tensor(np.ones((2, 4)), dtype)
    for count in range(1, 4):
        kernels.add_rms_norm(step, shared, ones, 1e-6)
        original += 1
        np.testing.assert_array_equal(to_array(ops.add(shared, step)), 2 * count + 1)


def test_same_input_same_bits(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    x = to_tensor(normal(rng, (33, 257), ms.float32), ms.float32)
    weight = make_weight(kernels, normal(rng, (500, 257), ms.float32), [500], ms.float32)
    first, second = (to_array(kernels.linear(x, weight)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_description() -> None:
    assert ReferenceKernels().describe() == "reference (plain MindSpore operators)"
