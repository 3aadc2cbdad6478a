"""The calls of the Ascend back end, of operators that do what their documentation says, give the reference's results.

Nothing here runs on the hardware. Both sides compute in float32, so results differ by roundings to the activations'
dtype: `unit` is one of them, relative. A result that both round once may be off by two, one on each side.
"""

import gc
import weakref
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from tests.ascend.arrays import wide
from tests.ascend.comparing import DTYPES, both, close, exact, unit
from tests.ascend.steps import BLOCK, STEPS, normal, numpy_of, step_of, weight_of
from vllm_ms_models.kernels import Integers, Kernels, Weight


@DTYPES
def test_products(dtype: Any) -> None:
    ascend, reference, standin = both()
    rng = np.random.default_rng(1)
    values, sizes = rng.normal(size=(96, 64)) / 8, [48, 48]
    x, bias = normal(rng, (7, 64), dtype), exact(rng.normal(size=96), dtype)
    mine, theirs = (weight_of(kernels, values, sizes, dtype) for kernels in (ascend, reference))
    close(ascend.linear(x, mine), reference.linear(x, theirs))
    products = np.abs(wide(reference.linear(x, theirs, dtype=ms.float32)))
    close(ascend.linear(x, mine, bias), reference.linear(x, theirs, bias), 2 * unit(dtype) * products)
    close(
        ascend.linear(x, mine, dtype=ms.float32), reference.linear(x, theirs, dtype=ms.float32), unit(dtype) * products
    )
    for got, want in zip(ascend.linear_split(x, mine), reference.linear_split(x, theirs), strict=True):
        close(got, want)
    eye = Tensor(np.eye(64, dtype=np.float32))
    close(ascend.linear(eye, mine), reference.linear(eye, theirs))  # float32, as loading asks for
    # Gate and up are off by a rounding each; an activation's slope is at most 1.13, and that of the gelus is a product
    # of its own, rounded once more.
    gate, up = np.split(products, 2, 1)
    for activation in ("silu", "gelu", "gelu_tanh"):
        got, want = (k.linear_gated(x, w, activation) for k, w in ((ascend, mine), (reference, theirs)))
        close(got, want, 4 * unit(dtype) * gate * up)
    assert standin.called.count("swiglu") == 1


@DTYPES
def test_embedding(dtype: Any) -> None:
    ascend, reference, _ = both()
    values = np.random.default_rng(1).normal(size=(40, 16))
    ids = Tensor(np.array([0, 39, 12, 100, 99, 139, 140, 5], np.int64))
    for first in (0, 100):
        got, want = (k.embedding(ids, weight_of(k, values, [40], dtype), first) for k in (ascend, reference))
        assert np.array_equal(wide(got), wide(want)) and got.dtype == want.dtype


@DTYPES
def test_rows(dtype: Any) -> None:
    ascend, reference, standin = both()
    x, rows = normal(np.random.default_rng(1), (40, 16), dtype), np.array([39, 0, 12, 12], np.int64)
    for kernels in (ascend, reference):
        got = kernels.take_rows(x, rows)
        assert np.array_equal(wide(got), wide(x)[rows]) and got.dtype == dtype
    assert standin.called == ["gather"]


@DTYPES
def test_elementwise(dtype: Any) -> None:
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    x, y = normal(rng, (5, 96), dtype), normal(rng, (5, 96), dtype)
    gamma, beta, of_heads = (exact(rng.normal(size=n), dtype) for n in (96, 96, 32))
    for kind in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu"):
        # quick_gelu's three steps are rounded each
        close(ascend.activate(x, kind), reference.activate(x, kind), 4 * unit(dtype) * np.abs(wide(x)))
    close(ascend.rms_norm(x, gamma, 1e-6), reference.rms_norm(x, gamma, 1e-6))
    close(ascend.rms_norm(x, of_heads, 1e-6), reference.rms_norm(x, of_heads, 1e-6))
    root = Tensor(np.full(96, 7.3 * 2.0**30, np.float32))  # as layers/scale.py multiplies
    close(ascend.rms_norm(x, root, 2.0**60), reference.rms_norm(x, root, 2.0**60))
    close(ascend.layer_norm(x, gamma, beta, 1e-5), reference.layer_norm(x, gamma, beta, 1e-5))
    products = 4 * unit(dtype) * np.abs(wide(x) * wide(y))
    close(ascend.silu_and_mul(x, y), reference.silu_and_mul(x, y), products)
    close(ascend.gelu_and_mul(x, y, True), reference.gelu_and_mul(x, y, True), products)
    for parameters in ((gamma,), (of_heads,), (gamma, beta)):
        residuals = [y.copy(), y.copy()]
        results = []
        for kernels, residual in zip((ascend, reference), residuals, strict=True):
            add: Any = kernels.add_layer_norm if len(parameters) == 2 else kernels.add_rms_norm
            results.append(add(x, residual, *parameters, 1e-6))
        close(results[0][0], results[1][0])
        assert np.array_equal(wide(results[0][1]), wide(results[1][1]))


@DTYPES
@pytest.mark.parametrize(("size", "offset"), [(64, 0), (32, 0), (32, 32), (16, 32)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(dtype: Any, size: int, offset: int, interleaved: bool) -> None:
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    angles = np.arange(50)[:, None] * 100.0 ** (-np.arange(size // 2) / size)
    table = exact(np.concatenate((np.cos(angles), np.sin(angles)), 1), dtype)
    positions = Tensor(rng.integers(0, 50, 6))
    inputs = [normal(rng, (6, 3 * 64), dtype), normal(rng, (6, 2 * (64 - offset)), dtype)]
    results = []
    for kernels in (ascend, reference):
        query, key = (x.copy() for x in inputs)
        results.append(kernels.rotary(query, key, positions, table, 64, interleaved, offset))
    for got, want in zip(*results, strict=True):
        close(got, want)


def test_tables_of_angles_for_one_step() -> None:
    """As images have: each step's are its own, the last few of which are kept, and the one for all steps among them."""
    ascend, reference, standin = both()
    rng = np.random.default_rng(1)
    always = exact(rng.normal(size=(50, 64)), ms.bfloat16)
    of_steps = set()
    for step in range(30):
        own = exact(rng.normal(size=(3, 64)), ms.bfloat16)
        for table, positions in ((always, rng.integers(0, 50, 6)), (own, np.arange(3))):
            query = normal(rng, (len(positions), 128), ms.bfloat16)
            rows, standin.uploads = Tensor(positions), []
            for _ in range(2):  # layers
                results = [k.rotary(query.copy(), query.copy(), rows, table, 64, False) for k in (ascend, reference)]
                for got, want in zip(*results, strict=True):
                    close(got, want)
            expected = 1 if table is always and step else 2  # how many rows there are; the table
            assert len(standin.uploads) == expected
        of_steps.add(weakref.ref(own))
    del own, table
    gc.collect()
    assert sum(each() is not None for each in of_steps) <= 4


@DTYPES
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (8, 2, 64), (4, 1, 128)])
def test_attention(dtype: Any, name: str, heads: int, kv_heads: int, size: int) -> None:
    ascend, reference, standin = both()
    rng = np.random.default_rng(1)
    step = step_of(STEPS[name], rng)
    old = [normal(rng, (step.earlier.shape[0], kv_heads * size), dtype) for _ in range(2)]
    new = [normal(rng, (step.tokens, kv_heads * size), dtype) for _ in range(2)]
    query = normal(rng, (step.tokens, heads * size), dtype)
    results = []
    for kernels in (ascend, reference):
        shape = kernels.cache_shape(step.blocks, BLOCK, kv_heads, size)
        cache = Tensor.from_numpy(np.full(shape, 7, numpy_of(dtype)))
        kernels.write_kv(old[0], old[1], cache, step.earlier)
        kernels.write_kv(new[0], new[1], cache, step.slots)
        # The second time, keys are in the cache only.
        results.append([kernels.paged_attention(query, cache, step.sequences, size**-0.5) for _ in range(2)])
    for got, want in zip(*results, strict=True):
        close(got, want)
    fresh = name in ("one token", "ragged prefill")
    assert standin.called.count("flash_attention") == fresh
    assert standin.called.count("paged_attention") == (0 if name == "empty" else 2 - fresh)


@DTYPES
def test_padding_is_skipped(dtype: Any) -> None:
    """Slots below 0 are not written, and rows behind the last sequence are no one's."""
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    step = step_of(STEPS["ragged prefill"], rng)
    slots = Tensor(np.concatenate((step.slots.asnumpy(), [-1, -1])))
    x = [normal(rng, (step.tokens + 2, 128), dtype) for _ in range(3)]
    results = []
    for kernels in (ascend, reference):
        cache = Tensor.from_numpy(np.zeros(kernels.cache_shape(step.blocks, BLOCK, 2, 64), numpy_of(dtype)))
        kernels.write_kv(x[1], x[2], cache, slots)
        results.append(kernels.paged_attention(x[0], cache, step.sequences, 0.125))
        assert np.count_nonzero(np.any(wide(cache) != 0, axis=-1)) == step.tokens * 2 * 2
    close(results[0][: step.tokens], results[1][: step.tokens])


@DTYPES
@pytest.mark.parametrize("name", STEPS)
def test_latent_attention(dtype: Any, name: str) -> None:
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    step = step_of(STEPS[name], rng)
    heads, nope, rope, rank, value = 3, 32, 16, 64, 32
    old, new = ([normal(rng, (n, w), dtype) for w in (rank, rope)] for n in (step.earlier.shape[0], step.tokens))
    absorbed = normal(rng, (step.tokens, heads * (rank + rope)), dtype)
    query = normal(rng, (step.tokens, heads * (nope + rope)), dtype)
    matrices = [rng.normal(size=(rows, rank)) / 8 for rows in heads * (nope, value)]
    results = []
    for kernels in (ascend, reference):
        cache = Tensor.from_numpy(
            np.zeros(kernels.latent_cache_shape(step.blocks, BLOCK, rank + rope), numpy_of(dtype))
        )
        kernels.write_latent(old[0], old[1], cache, step.earlier)
        kernels.write_latent(new[0], new[1], cache, step.slots)
        loaded = [weight_of(kernels, matrix, [len(matrix)], dtype) for matrix in matrices]
        keys, values = loaded[::2], loaded[1::2]
        means = kernels.mla_attention(absorbed, cache, step.sequences, 0.1, rank)
        projected = kernels.linear_heads(means, values)
        results.append((means, projected, kernels.mla_prefill(query, cache, step.sequences, keys, values, 0.1)))
    (means, projected, expanded), (want_means, want_projected, want_expanded) = results
    close(means, want_means)
    # The means differ by two roundings, and then products are rounded: of 64 terms below 5 * 0.5 each.
    spread = 2 * unit(dtype) * rank**0.5 * 4 * np.abs(matrices[1]).max()
    close(projected, want_projected, spread)
    # The ascend side rounds absorbed queries and means, the reference keys and values. A score, 0.1 times a sum over
    # 48 or 80 products of numbers about 1, is off by less than 2 roundings of 0.1 * 80; that changes shares by twice
    # as much, relatively, and a value is at most 5.
    close(expanded, want_expanded, spread + 2 * (2 * unit(dtype) * 8) * 5)


@DTYPES
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_int8(dtype: Any, activations: Any) -> None:
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    values = rng.integers(-127, 128, (96, 64)).astype(np.int8)
    scales = rng.uniform(1e-3, 1e-2, (96, 1)).astype(np.float32)
    addends = rng.integers(-500, 500, 96).astype(np.int32)

    def weight(kernels: Kernels, inputs: tuple[float, float]) -> Weight:
        weight = kernels.new_integer_weight([48, 48], 64, Integers(8, 0, activations))
        for part in range(2):
            rows = slice(48 * part, 48 * part + 48)
            kernels.load_integers(weight, part, 0, values[rows])
            kernels.load_scales(weight, part, 0, scales[rows], None, addends[rows] if activations == "static" else None)
            if activations == "static":
                # Powers of two, which every dtype holds; and an even offset, as the operator rounds to even after it is
                # added, the reference before. So no rounding differs.
                kernels.set_input(weight, part, inputs[part], 4)
        return weight

    x = normal(rng, (7, 64), dtype)
    # "dynamic" divides by the scale where the reference multiplies: a value in the middle may round to either side.
    flip = np.abs(wide(x)).max(1, keepdims=True) / 127 * scales.T * 127 if activations == "dynamic" else 0.0
    for inputs in ((2.0**-5, 2.0**-5), (2.0**-5, 2.0**-4)):
        close(ascend.linear(x, weight(ascend, inputs)), reference.linear(x, weight(reference, inputs)), flip)
