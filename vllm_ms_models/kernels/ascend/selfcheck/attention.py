"""Rotation, caches and attention on tiny inputs, and in NumPy what they mean. **Not run on hardware.**"""

import numpy as np

from vllm_ms_models.kernels.ascend.caches import doubled_slots, half_blocks
from vllm_ms_models.kernels.ascend.prepared import MASKED, triangle
from vllm_ms_models.kernels.ascend.selfcheck.cases import Given, Result, case

BLOCK = 128  # positions of a block of the caches
HEADS, KV_HEADS, SIZE = 4, 2, 64


@case("apply_rotary_pos_emb")
def rotary(given: Given) -> list[Result]:
    angles = given.rng.uniform(0, 6, (5, SIZE // 2))
    cos, sin = (given.rounded(np.tile(f(angles), 2)) for f in (np.cos, np.sin))
    inputs = [given.floats(5, heads * SIZE) for heads in (HEADS, KV_HEADS)]
    lengths = given.int32([2, 3])
    turned = given.ops.apply_rotary_pos_emb(inputs[0][0], inputs[1][0], given.place(cos), given.place(sin), lengths)
    results = []
    c, s = cos.astype(np.float64)[:, None], sin.astype(np.float64)[:, None]
    for got, (_, values) in zip(turned, inputs, strict=True):
        heads = values.reshape(5, -1, SIZE)
        first, second = np.split(heads, 2, -1)
        other = np.concatenate((-second, first), -1)
        want, terms = heads * c + other * s, np.abs(heads * c) + np.abs(other * s)
        results.append(Result(got, want.reshape(values.shape), terms.reshape(values.shape)))
    return results


@case("reshape_and_cache", "a slot of -1 is skipped")
def reshape_and_cache(given: Given) -> list[Result]:
    slots = [130, 3, -1, 255]
    inputs = [given.floats(4, KV_HEADS * SIZE) for _ in range(2)]
    caches = [given.zeros(2, BLOCK, KV_HEADS, SIZE) for _ in range(2)]
    given.ops.reshape_and_cache(inputs[0][0], inputs[1][0], caches[0], caches[1], given.int32(slots))
    wanted = [np.zeros((2 * BLOCK, KV_HEADS * SIZE)) for _ in range(2)]
    for want, (_, values) in zip(wanted, inputs, strict=True):
        want[[130, 3, 255]] = values[[0, 1, 3]]
    return [Result(cache, want.reshape(cache.shape)) for cache, want in zip(caches, wanted, strict=True)]


@case("reshape_and_cache", "keys without values")
def keys_only(given: Given) -> list[Result]:
    keys, values = given.floats(2, 576)
    cache = given.zeros(2, BLOCK, 1, 576)
    given.ops.reshape_and_cache(keys, None, cache, None, given.int32([200, 1]))
    want = np.zeros((2 * BLOCK, 576))
    want[[200, 1]] = values
    return [Result(cache, want.reshape(cache.shape))]


@case("reshape_and_cache", "keys and values as views of one cache")
def into_views(given: Given) -> list[Result]:
    slots = np.array([130, 3, 255])
    inputs = [given.floats(3, KV_HEADS * SIZE) for _ in range(2)]
    cache = given.zeros(2, 2, BLOCK, KV_HEADS, SIZE)
    keys, values = half_blocks(cache)
    given.ops.reshape_and_cache(inputs[0][0], inputs[1][0], keys, values, doubled_slots(given.int32(slots), BLOCK))
    want = np.zeros((2, 2, BLOCK, KV_HEADS * SIZE))
    for part, (_, new) in enumerate(inputs):
        want[slots // BLOCK, part, slots % BLOCK] = new
    return [Result(cache, want.reshape(cache.shape))]


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of `[rows, heads, size]`, the last positions of k and v `[positions, kv_heads, size]`.

    With the magnitude of its terms: an error of the scores, which are sums, changes the shares by as much, relatively.
    """
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * scale
    later = np.triu(np.full((len(q), len(k)), causal), 1 + len(k) - len(q))
    shares = np.exp(np.where(later, -np.inf, scores) - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    spread = 1 + np.einsum("qhd,khd->hqk", np.abs(q), np.abs(k)).max() * scale
    want, terms = (np.einsum("hqk,khd->qhd", shares, x).reshape(len(q), -1) for x in (v, np.abs(v)))
    return want, terms * spread


def _paged(given: Given, queries: list[int], lengths: list[int], views: bool, block: int = BLOCK) -> list[Result]:
    """PagedAttention of sequences whose blocks lie in any order; with several rows of one, under a mask."""
    each = -(-max(lengths) // block)
    blocks = 2 * each + 1
    tables = given.rng.permutation(blocks)[: 2 * each].reshape(2, each)
    values = given.rounded(given.rng.normal(size=(blocks, 2, block, KV_HEADS, SIZE)))
    query, q = given.floats(sum(queries), HEADS * SIZE)
    if views:
        keys, rest = half_blocks(given.place(values))
    else:
        keys, rest = (given.place(values[:, part]) for part in range(2))
    mask = None
    positions = np.concatenate([np.arange(n - m, n) for m, n in zip(queries, lengths, strict=True)])
    if max(queries) > 1:
        added = np.where(np.arange(max(lengths)) > positions[:, None], np.float32(MASKED), np.float32(0))
        mask = given.place(given.rounded(added))
    got = given.ops.paged_attention(
        query,
        keys,
        rest,
        given.int32(tables * 2 if views else tables),
        given.int32(lengths),
        mask,
        None if mask is None else given.int32(queries),
        HEADS,
        KV_HEADS,
        SIZE**-0.5,
        0,
    )
    parts, first = [], 0
    for table, rows, length in zip(tables, queries, lengths, strict=True):
        k, v = (values[table, part].reshape(-1, KV_HEADS, SIZE)[:length].astype(np.float64) for part in range(2))
        parts.append(attend(q[first : first + rows].reshape(rows, HEADS, SIZE), k, v, SIZE**-0.5))
        first += rows
    want, terms = (np.concatenate(x) for x in zip(*parts, strict=True))
    return [Result(got, want, terms)]


@case("paged_attention", "decoding")
def decoding(given: Given) -> list[Result]:
    return _paged(given, [1, 1], [200, 7], views=False)


@case("paged_attention", "decoding, views of one cache")
def decoding_views(given: Given) -> list[Result]:
    return _paged(given, [1, 1], [200, 7], views=True)


@case("paged_attention", "decoding, views of one cache, blocks of 32")
def decoding_small_blocks(given: Given) -> list[Result]:
    return _paged(given, [1, 1], [200, 7], views=True, block=32)  # this package's default


@case("paged_attention", "several rows of a sequence")
def chunks(given: Given) -> list[Result]:
    return _paged(given, [5, 1], [140, 60], views=False)


@case("paged_attention", "latents: values within their keys")
def latents(given: Given) -> list[Result]:
    heads, width, rank, scale = 16, 576, 512, 0.05
    values = given.rounded(given.rng.normal(size=(3, BLOCK, 1, width)))
    query, q = given.floats(2, heads * width)
    cache, tables, lengths = given.place(values), np.array([[2, 0], [1, 0]]), [150, 9]
    got = given.ops.paged_attention(
        query, cache, cache, given.int32(tables), given.int32(lengths), None, None, heads, 1, scale, rank
    )
    parts = []
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        k = values[table].reshape(-1, 1, width)[:length].astype(np.float64)
        parts.append(attend(q[row].reshape(1, heads, width), k, k[..., :rank], scale))
    want, terms = (np.concatenate(x) for x in zip(*parts, strict=True))
    return [Result(got, want, terms)]


def _flash(given: Given, causal: bool, size: int = SIZE) -> list[Result]:
    lengths = [5, 150]  # beyond the mask's 128, too
    (query, q), (key, k), (value, v) = (
        given.floats(sum(lengths), heads * size) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    mask = given.ops.to_device(triangle(given.dtype)) if causal else None
    got = given.ops.flash_attention(
        query, key, value, mask, given.int32(lengths), given.int32(lengths), HEADS, size**-0.5
    )
    parts = []
    for rows in (slice(0, 5), slice(5, 155)):
        a, b, c = (x[rows].reshape(rows.stop - rows.start, -1, size) for x in (q, k, v))
        parts.append(attend(a, b, c, size**-0.5, causal))
    want, terms = (np.concatenate(x) for x in zip(*parts, strict=True))
    return [Result(got, want, terms)]


@case("flash_attention")
def flash_attention(given: Given) -> list[Result]:
    return _flash(given, causal=True)


@case("flash_attention", "in both directions")
def both_directions(given: Given) -> list[Result]:
    return _flash(given, causal=False)


@case("flash_attention", "in both directions, heads of 80")
def heads_of_towers(given: Given) -> list[Result]:
    return _flash(given, causal=False, size=80)  # Qwen2.5-VL's tower
