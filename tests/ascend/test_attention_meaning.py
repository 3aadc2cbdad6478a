"""Attention of the Ascend back end with all that the interface knows, of operators that do what is documented.

Nothing here runs on the hardware. As in test_meaning.py, both sides compute in float32 and round once.
"""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from tests.ascend.comparing import DTYPES, both, close, exact
from tests.ascend.contract import array_of
from tests.ascend.standin import wide
from tests.ascend.steps import BLOCK, STEPS, Step, normal, numpy_of, step_of
from vllm_ms_models.kernels import Kernels
from vllm_ms_models.kernels.ascend import plain_attention

LONG = {
    "long decode": [(1, 70), (1, 9), (1, 48), (1, 33)],
    "chunks": [(20, 70), (1, 50), (3, 3), (17, 33)],
    "long prefill": [(50, 50), (7, 7)],
}
ALL_STEPS = STEPS | LONG
# Of a step in which every sequence is whole: what an encoder has.
WHOLE = ("one token", "ragged prefill", "long prefill")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("one token", "mixed with context", "long decode")]


def cache_of(kernels: Kernels, step: Step, x: list[Tensor], kv_heads: int, size: int, storage: Any) -> Tensor:
    """A cache with the old keys and values of `x`, which starts with these, and then the new ones."""
    memory = np.full(kernels.cache_shape(step.blocks, BLOCK, kv_heads, size, storage), 7)
    cache = Tensor.from_numpy(memory.astype(np.int8 if storage else numpy_of(x[0].dtype)))
    kernels.write_kv(x[0], x[1], cache, step.earlier)
    kernels.write_kv(x[2], x[3], cache, step.slots)
    return cache


def as_reference(cache: Tensor) -> Tensor:
    """A cache of int8 as the reference has it, to the bit: what rounds to which integers has a test of its own."""
    return Tensor.from_numpy(np.ascontiguousarray(cache.asnumpy().swapaxes(2, 3)))


def compare(
    pairs: list[tuple[int, int]], dtype: Any, heads: int, kv_heads: int, size: int, storage: Any = None, **options: Any
) -> list[str]:
    """The names of the operators called for attention twice: the second time all keys are only in the cache."""
    ascend, reference, standin = both()
    rng = np.random.default_rng(1)
    step = step_of(pairs, rng)
    counts = (step.earlier.shape[0], step.earlier.shape[0], step.tokens, step.tokens)
    x = [normal(rng, (count, kv_heads * size), dtype) for count in counts]
    query = normal(rng, (step.tokens, heads * size), dtype)
    caches = [cache_of(kernels, step, x, kv_heads, size, storage) for kernels in (ascend, reference)]
    if storage:
        caches[1] = as_reference(caches[0])
    got, want = (
        [kernels.paged_attention(query, cache, step.sequences, size**-0.5, **options) for _ in range(2)]
        for kernels, cache in zip((ascend, reference), caches, strict=True)
    )
    for one, other in zip(got, want, strict=True):
        close(one, other)
    return standin.called


@DTYPES
@pytest.mark.parametrize("name", ["chunks", "long prefill", *SLOW])
@pytest.mark.parametrize("window", [1, 16, 33, 200])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window(dtype: Any, name: str, window: int, causal: bool) -> None:
    pairs = ALL_STEPS[name]
    called = compare(pairs, dtype, 4, 2, 64, window=window, causal=causal)
    # Keys that were just written go to FlashAttentionScore, if the window hides nothing of them.
    assert called.count("flash_attention") == all(new == total <= window for new, total in pairs)
    assert set(called) <= {"reshape_and_cache", "flash_attention", "paged_attention"}


@DTYPES
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 32), (8, 2, 64)])
def test_both_directions(dtype: Any, name: str, heads: int, kv_heads: int, size: int) -> None:
    called = compare(ALL_STEPS[name], dtype, heads, kv_heads, size, causal=False)
    assert called.count("flash_attention") == called.count("paged_attention") == 1


PLAIN: dict[str, dict[str, Any]] = {
    "soft cap": {"soft_cap": 1.5},
    "soft cap, window": {"soft_cap": 30.0, "window": 12},
    "sinks": {"sinks": True},
    "sinks, window, both directions": {"sinks": True, "window": 7, "causal": False},
    "both directions, cap": {"soft_cap": 2.0, "causal": False},
    "int8": {"storage": ms.int8},
    "int8, window": {"storage": ms.int8, "window": 20},
    "int8, all": {"storage": ms.int8, "window": 9, "soft_cap": 3.0, "sinks": True, "causal": False},
}


@DTYPES
@pytest.mark.parametrize("name", ["empty", "chunks", *SLOW])
@pytest.mark.parametrize("case", PLAIN)
def test_what_no_fused_operator_has(dtype: Any, name: str, case: str) -> None:
    options = dict(PLAIN[case])
    if "sinks" in options:
        options["sinks"] = exact(np.random.default_rng(2).normal(size=6) * 2, dtype)
    called = compare(ALL_STEPS[name], dtype, 6, 2, 32, **options)
    assert ("softmax" in called) == (name != "empty") and not {"paged_attention", "flash_attention"} & set(called)


@DTYPES
@pytest.mark.parametrize("size", [8, 20, 72])
@pytest.mark.parametrize("causal", [True, False])
def test_heads_that_are_no_multiple_of_16(dtype: Any, size: int, causal: bool) -> None:
    called = compare(ALL_STEPS["chunks"], dtype, 4, 2, size, causal=causal)
    assert "index_put" in called and "reshape_and_cache" not in called
    compare(ALL_STEPS["chunks"], dtype, 4, 2, size, storage=ms.int8)


def test_few_scores_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_attention, "SCORES", 4 * 70 * 6)  # six rows of the longest sequence
    for window, causal in ((None, True), (30, True), (None, False), (30, False)):
        compare(ALL_STEPS["chunks"], ms.float16, 4, 2, 32, soft_cap=2.0, window=window, causal=causal)


@pytest.mark.parametrize("options", [{}, {"soft_cap": 5.0}, {"storage": ms.int8}], ids=["paged", "plain", "int8"])
def test_pages_before_the_window_are_not_read(options: dict[str, Any]) -> None:
    """vLLM gives them to other sequences: their contents may be anything, and their numbers those of no block."""
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    step = step_of([(1, 70), (20, 60), (1, 9)], rng)
    window, storage = 18, options.get("storage")
    counts = (step.earlier.shape[0], step.earlier.shape[0], step.tokens, step.tokens)
    x = [normal(rng, (count, 64), ms.float16) for count in counts]
    query = normal(rng, (step.tokens, 128), ms.float16)
    mine, theirs = (cache_of(kernels, step, x, 2, 32, storage) for kernels in (ascend, reference))
    theirs = as_reference(mine) if storage else theirs
    cap = options.get("soft_cap")
    want = reference.paged_attention(query, theirs, step.sequences, 0.2, window, cap)
    tables = step.sequences.block_tables.asnumpy()  # whose memory the tensor is
    tables[0, : (70 - window) // BLOCK] = 1 << 29
    tables[1, : (41 - window) // BLOCK] = -5
    close(ascend.paged_attention(query, mine, step.sequences, 0.2, window, cap), want)


@DTYPES
@pytest.mark.parametrize("options", [{"size": 32}, {"size": 20}, {"size": 32, "storage": ms.int8}], ids=str)
def test_padding_of_plain_caches(dtype: Any, options: dict[str, Any]) -> None:
    """Slots below 0 are skipped, all of them too, and rows behind the last sequence are no one's."""
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    step = step_of(STEPS["ragged prefill"], rng)
    slots = Tensor(np.concatenate((step.slots.asnumpy(), [-1, -1])))
    nowhere = Tensor(np.full(step.tokens + 2, -1))
    size, storage = options["size"], options.get("storage")
    x = [normal(rng, (step.tokens + 2, 2 * size), dtype) for _ in range(3)]
    caches: list[Tensor] = []
    for kernels in (ascend, reference):
        memory = np.zeros(kernels.cache_shape(step.blocks, BLOCK, 2, size, storage))
        cache = Tensor.from_numpy(memory.astype(np.int8 if storage else numpy_of(dtype)))
        kernels.write_kv(x[1], x[2], cache, nowhere)
        assert not array_of(cache).any()
        kernels.write_kv(x[1], x[2], cache, slots)
        assert np.count_nonzero((array_of(cache) != 0).any(-1)) == step.tokens * 2 * 2
        caches.append(as_reference(caches[0]) if storage and caches else cache)
    results = [
        kernels.paged_attention(x[0], cache, step.sequences, 0.125, soft_cap=4.0)
        for kernels, cache in zip((ascend, reference), caches, strict=True)
    ]
    close(results[0][: step.tokens], results[1][: step.tokens])


def test_a_part_of_a_batch() -> None:
    """Sequences of the same step taken apart: then the rows just written are not those of the query."""
    ascend, reference, standin = both()
    rng = np.random.default_rng(1)
    step = step_of(STEPS["ragged prefill"], rng)
    x = [normal(rng, (step.tokens, 64), ms.float16) for _ in range(3)]
    results = []
    for kernels in (ascend, reference):
        cache = Tensor.from_numpy(np.zeros(kernels.cache_shape(step.blocks, BLOCK, 1, 64), np.float16))
        kernels.write_kv(x[0], x[1], cache, step.slots)
        first, last = step.sequences.part(0, 2), step.sequences.part(2, 4)
        results.append(kernels.paged_attention(x[2][22:].contiguous(), cache, last, 0.1))
        results.append(kernels.paged_attention(x[2][:22].contiguous(), cache, first, 0.1, soft_cap=9.0))
    close(results[0], results[2])
    close(results[1], results[3])
    assert "flash_attention" not in standin.called


def test_what_is_written_to_int8() -> None:
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 64, 2, 32)) * rng.choice([0.0, 1e-6, 1.0, 3000.0], (2, 64, 2, 1))
    x[0, 3, 0, 5], x[1, 9, 1, 0], x[0, 11, 1, 31] = np.nan, np.inf, -np.inf
    key, value = (Tensor.from_numpy(part.reshape(64, 64).astype(np.float16)) for part in x)
    slots, found = Tensor(rng.permutation(80)[:64]), []
    for kernels in (ascend, reference):
        cache = Tensor.from_numpy(np.full(kernels.cache_shape(5, BLOCK, 2, 32, ms.int8), 9, np.int8))
        kernels.write_kv(key, value, cache, slots)
        rows = (cache if kernels is reference else as_reference(cache)).asnumpy()
        rows = rows.transpose(1, 0, 3, 2, 4).reshape(2, 80, 2, 36)[:, slots.asnumpy()]
        found.append((rows[..., :32].astype(int), np.ascontiguousarray(rows[..., 32:]).view(np.float32)[..., 0]))
    (integers, scales), (want, of_want) = found
    assert np.isnan(of_want).sum() == 3
    np.testing.assert_allclose(scales, of_want, rtol=2.0**-22)  # an operator's quotients are off by an ulp
    exact = np.stack([array_of(part).reshape(64, 2, 32) for part in (key, value)]).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        quotients = exact * (127 / np.abs(exact).max(-1, keepdims=True))
    known = np.isfinite(of_want)[..., None] & (np.abs(exact).max(-1, keepdims=True) > 0)
    # Then a value that lies between two integers may become either.
    between = np.abs(np.abs(quotients - np.floor(quotients)) - 0.5) < 127 * 2.0**-22
    assert np.array_equal(integers[known & ~between], want[known & ~between])
    assert not integers[~np.broadcast_to(known, want.shape)].any() and np.abs(integers - want).max() <= 1


def test_what_is_not_attended_to_cannot_make_a_row_nan() -> None:
    ascend, reference, _ = both()
    rng = np.random.default_rng(1)
    step = step_of([(6, 20), (4, 4)], rng)
    old, new = (normal(rng, (n, 32), ms.float16) for n in (step.earlier.shape[0], step.tokens))
    query = normal(rng, (step.tokens, 32), ms.float16)
    array_of(new)[5, 3] = np.inf  # the last of the first sequence
    cache = cache_of(ascend, step, [old, old, new, new], 1, 32, ms.int8)
    got = ascend.paged_attention(query, cache, step.sequences, 0.2)
    want = reference.paged_attention(query, as_reference(cache), step.sequences, 0.2)
    assert np.isnan(wide(got)[5]).all() and np.isnan(wide(want)[5]).all()
    for rows in (slice(0, 5), slice(6, None)):
        close(got[rows], want[rows])


def test_wrong_arguments() -> None:
    ascend, _, _ = both()
    rng = np.random.default_rng(1)
    step = step_of([(3, 3)], rng)
    with pytest.raises(ValueError, match="blocks of 24 are not multiples of 16"):
        ascend.cache_shape(2, 24, 1, 32)
    cache = Tensor.from_numpy(np.zeros(ascend.cache_shape(step.blocks, BLOCK, 1, 20), np.float16))
    x = normal(rng, (3, 20), ms.float16)
    with pytest.raises(ValueError, match="a slot lies beyond the last of 3 blocks of 16"):
        ascend.write_kv(x, x, cache, Tensor(np.array([0, 1, 48])))
    with pytest.raises(ValueError, match="2 slots for 3 tokens"):
        ascend.write_kv(x, x, cache, Tensor(np.array([0, 1])))
    with pytest.raises(ValueError, match=r"1 heads have sinks \(2,\)"):
        ascend.paged_attention(x, cache, step.sequences, 1.0, sinks=Tensor(np.zeros(2, np.float32)))
