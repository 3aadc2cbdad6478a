"""What each kernel computes, in float64 NumPy, with the error float32 arithmetic may add; and tensors to try it on.

A reference returns the exact values and, where rounding is possible, a bound on the error of a float32 computation of
them, in any order of summation. `assert_close` adds half a unit in the last place of the result's dtype for the one
rounding at the end. With u = 2^-24, the relative error of one float32 operation:

* a sum of n products is off by at most (n + 1) u times the sum of the products' magnitudes, whatever the order;
* `EXP` bounds the relative error of exp(z): (64 + 8 |z|) u. A correctly rounded exp would need 1 u; MindSpore's on CPU
  was measured at (55 + 4.3 |z|) u, and vectorised ones with a short polynomial are alike;
* results below 1e-35 may be flushed to zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from mindspore import Tensor
from mindspore.utils.dlpack import from_dlpack

from vllm_ms_models.kernels import Kernels, PagedSequences, Weight
from vllm_ms_models.kernels.cpu import CpuKernels

UNIT = 2.0**-24
TINY = 1e-35
DTYPES = (ms.float32, ms.bfloat16, ms.float16)
NUMPY = {ms.float32: np.dtype(np.float32), ms.bfloat16: np.dtype(ml_dtypes.bfloat16), ms.float16: np.dtype(np.float16)}
TORCH = {ms.float32: torch.float32, ms.bfloat16: torch.bfloat16, ms.float16: torch.float16}
DIGITS = {ms.float32: 24, ms.bfloat16: 8, ms.float16: 11}  # significant binary digits
LOWEST = {ms.float32: -126, ms.bfloat16: -126, ms.float16: -14}  # exponent of the smallest normal number

Bounded = tuple[np.ndarray, np.ndarray]  # values and the error they may have before the last rounding


# --- tensors ---------------------------------------------------------------------------------------------------


def ulp(values: np.ndarray, dtype: Any) -> np.ndarray:
    """The distance between neighbours of `values` in `dtype`."""
    exponent = np.frexp(np.abs(values))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, LOWEST[dtype]) - DIGITS[dtype] + 1)


def rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """`values` to the nearest numbers of `dtype`, ties to even, in float64; infinite beyond its range."""
    values = np.asarray(values, np.float64)
    step = ulp(values, dtype)
    nearest = np.rint(values / step) * step
    return np.where(np.abs(nearest) > float(ml_dtypes.finfo(NUMPY[dtype]).max), np.copysign(np.inf, values), nearest)


def to_tensor(values: np.ndarray, dtype: Any) -> Tensor:
    """A new tensor of `values` rounded to `dtype` (a float dtype; integers keep theirs if `dtype` is None)."""
    array = np.ascontiguousarray(values if dtype is None else rounded(values, dtype).astype(NUMPY[dtype]))
    if dtype == ms.bfloat16:
        return Tensor(array.view(np.int16)).view(ms.bfloat16)
    return Tensor(array)


def to_array(tensor: Tensor) -> np.ndarray:
    """A float64 copy of a tensor's values."""
    if tensor.dtype == ms.bfloat16:
        return tensor.view(ms.int16).asnumpy().view(ml_dtypes.bfloat16).astype(np.float64)
    return tensor.asnumpy().astype(np.float64)


def shared(values: np.ndarray, dtype: Any) -> tuple[torch.Tensor, Tensor]:
    """A torch tensor of `values` and the MindSpore tensor over the same memory."""
    original = torch.from_numpy(rounded(values, dtype)).to(TORCH[dtype])
    return original, from_dlpack(torch.utils.dlpack.to_dlpack(original))


def make_weight(kernels: Kernels, values: np.ndarray, sizes: Sequence[int], dtype: Any) -> Weight:
    """`values` `[sum(sizes), in_features]`, which `dtype` must hold exactly, loaded as the parts of one weight."""
    weight = kernels.new_weight(sizes, values.shape[1], dtype)
    source = values.astype(NUMPY[dtype])
    for part, rows in enumerate(np.split(source, np.cumsum(sizes)[:-1])):
        kernels.load_rows(weight, part, 0, rows)
    return weight


def assert_close(got: Tensor, want: Bounded, dtype: Any) -> None:
    """`got` has `dtype` and the shape and values of `want`, up to its bound and one rounding (maybe to infinity)."""
    values, error = want
    assert got.dtype == dtype, f"{got.dtype} instead of {dtype}"
    assert got.shape == values.shape, f"{got.shape} instead of {values.shape}"
    error = error + TINY
    allowed = error + ulp(np.abs(values) + error, dtype) / 2
    off = np.abs(to_array(got) - values)
    beyond = np.abs(values) + allowed > float(ml_dtypes.finfo(NUMPY[dtype]).max)
    bad = np.argwhere(~((off <= allowed) | (beyond & (to_array(got) == np.sign(values) * np.inf))))
    if bad.size:
        at = tuple(bad[0])
        raise AssertionError(
            f"{len(bad)} of {values.size} values are off; the first, at {at}: {to_array(got)[at]!r} instead of "
            f"{values[at]!r}, off by {off[at]:.3g} where {allowed[at]:.3g} is allowed"
        )


# --- references ------------------------------------------------------------------------------------------------


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> Bounded:
    """`n` products and a bias, summed in any order."""
    bias = np.zeros(len(weight)) if bias is None else bias
    magnitude = np.abs(x) @ np.abs(weight).T + np.abs(bias)
    return x @ weight.T + bias, (x.shape[1] + 2) * UNIT * magnitude


def embedding(ids: np.ndarray, weight: np.ndarray, first_row: int) -> np.ndarray:
    rows = ids - first_row
    known = (rows >= 0) & (rows < len(weight))
    return np.where(known[:, None], weight[np.where(known, rows, 0)], 0.0)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> Bounded:
    """The sum of squares is off by a relative (n + 2) u, its root by half of that; then a few operations."""
    values = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * weight
    return values, ((x.shape[-1] + 2) / 2 + 6) * UNIT * np.abs(values)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> Bounded:
    """The mean is off by (n + 1) u times the mean of |x|; that moves every distance from it, and their root mean square
    by no more; the rest as in `rms_norm`, and the sum with the bias."""
    count = x.shape[-1]
    off = x - np.mean(x, -1, keepdims=True)
    scale = 1 / np.sqrt(np.mean(off**2, -1, keepdims=True) + eps)
    moved = (count + 2) * UNIT * np.mean(np.abs(x), -1, keepdims=True)
    products = off * scale * weight
    error = ((count + 2) / 2 + 6) * UNIT * np.abs(products) + moved * scale * (np.abs(weight) + np.abs(products))
    error += UNIT * np.abs(x * scale * weight)  # the difference x - mean is rounded
    return products + bias, error + 2 * UNIT * (np.abs(products) + np.abs(bias))


def activated(kind: str, x: np.ndarray) -> Bounded:
    """As `gated`, of which the first three are a part."""
    if kind == "relu":
        return np.maximum(x, 0), np.zeros_like(x)
    if kind == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x)), 24 * UNIT * np.abs(x)
    return gated(kind, x, np.ones_like(x))


def linear_gated(kind: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> Bounded:
    """`activation(gate) * up` of products: their errors pass through the activation, whose slope is below 1.13."""
    return gated_products(kind, *linear(x, weight, bias))


def gated_products(kind: str, products: np.ndarray, errors: np.ndarray) -> Bounded:
    """As `linear_gated`, of gate and up side by side."""
    (gate, up), (gate_error, up_error) = np.split(products, 2, 1), np.split(errors, 2, 1)
    values, error = gated(kind, gate, up)
    slope = 1.13 * gate_error
    if kind == "clamped_swiglu":  # limits only make differences smaller
        up = np.clip(up, -7, 7) + 1
    return values, error + slope * (np.abs(up) + up_error) + (np.abs(gate) + slope) * up_error


def gated(kind: str, gate: np.ndarray, up: np.ndarray) -> Bounded:
    """`gate * share(gate) * up` with 0 <= share <= 1; `kind` is "silu", "gelu", "gelu_tanh" or "clamped_swiglu".

    A share s = 1 / (1 + exp(-z)) is off by s (1 - s) times the relative error of the exponential, (64 + 14 |z|) u with
    that of z (itself off by a relative 6 u in the tanh form): at most 19.2 u. erf has an absolute error of a few u.
    """
    if kind == "clamped_swiglu":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
        share = 1 / (1 + np.exp(-1.702 * gate))
    elif kind == "silu":
        share = 1 / (1 + np.exp(-gate))
    elif kind == "gelu_tanh":
        share = (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2
    else:
        share = (1 + torch.erf(torch.from_numpy(gate / np.sqrt(2))).numpy()) / 2
    return gate * share * up, 24 * UNIT * np.abs(gate * up)


def rotary(x: np.ndarray, positions: np.ndarray, cos_sin: np.ndarray, head_size: int, interleaved: bool) -> Bounded:
    """Two products and their sum; what does not rotate is exact."""
    half = cos_sin.shape[1] // 2
    pairs = np.arange(half)
    first = 2 * pairs if interleaved else pairs
    second = first + 1 if interleaved else first + half
    heads = x.reshape(len(x), x.shape[1] // head_size, head_size)
    cos, sin = cos_sin[positions, None, :half], cos_sin[positions, None, half:]
    values, error = heads.copy(), np.zeros_like(heads)
    for a, b, sign in ((first, second, -1.0), (second, first, 1.0)):
        values[..., a] = heads[..., a] * cos + sign * heads[..., b] * sin
        error[..., a] = 3 * UNIT * (np.abs(heads[..., a] * cos) + np.abs(heads[..., b] * sin))
    return values.reshape(x.shape), error.reshape(x.shape)


@dataclass(frozen=True)
class Paged:
    """Sequences over a paged cache `[blocks, 2, kv_heads, block_size, head_size]`, as NumPy arrays."""

    cache: np.ndarray
    query_start: np.ndarray
    seq_lens: np.ndarray
    block_tables: np.ndarray

    def tensors(self) -> PagedSequences:
        return PagedSequences(
            Tensor(self.query_start),
            Tensor(self.seq_lens),
            Tensor(self.block_tables),
            int(np.diff(self.query_start).max(initial=0)),
            int(self.seq_lens.max(initial=0)),
        )


def block_sizes(kernels: Kernels) -> tuple[int, ...]:
    """Some that the back end takes."""
    return (16, 32, 48) if isinstance(kernels, CpuKernels) else (1, 2, 3, 4, 5, 16)


def _order(kernels: Kernels, dtype: Any, block_size: int, head_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in its piece of a block each key and each value lies, `[block_size, head_size]` each (kv_cache.cpp)."""
    plain = np.arange(block_size * head_size).reshape(block_size, head_size)
    if not isinstance(kernels, CpuKernels):
        return plain, plain
    panels = plain.reshape(-1, 16 * head_size)
    if dtype != ms.bfloat16:
        return panels.reshape(-1, head_size, 16).transpose(0, 2, 1).reshape(plain.shape), plain
    even = head_size // 2 * 2
    pairs = (
        panels[:, : 16 * even].reshape(len(panels), even // 2, 16, 2).transpose(0, 2, 1, 3).reshape(block_size, even)
    )
    keys = np.concatenate((pairs, panels[:, 16 * even :].reshape(block_size, -1)), 1)
    return keys, plain.reshape(-1, head_size, 2).transpose(0, 2, 1).reshape(plain.shape)


def pack_cache(kernels: Kernels, cache: np.ndarray, dtype: Any) -> np.ndarray:
    """A cache `[blocks, 2, kv_heads, block_size, head_size]` as the back end keeps it."""
    pieces = np.empty((*cache.shape[:3], cache.shape[3] * cache.shape[4]))
    for part, order in enumerate(_order(kernels, dtype, *cache.shape[3:])):
        pieces[:, part, :, order] = np.moveaxis(cache[:, part], (2, 3), (0, 1))
    return pieces.reshape(cache.shape)


def unpack_cache(kernels: Kernels, packed: np.ndarray, dtype: Any) -> np.ndarray:
    """What `pack_cache` was given."""
    pieces = packed.reshape(*packed.shape[:3], -1)
    orders = _order(kernels, dtype, *packed.shape[3:])
    return np.stack([pieces[:, part][..., order] for part, order in enumerate(orders)], 1)


def share_error(kernels: Kernels, dtype: Any) -> float:
    """Relative error of each probability beyond float32's: 0, but where they are rounded to bfloat16.

    There it is 2^-8 (8 significant digits: half of 2^-7 at 1) and what the short polynomial of the exponential is off
    by, 1.02e-4.
    """
    rounds = isinstance(kernels, CpuKernels) and kernels.isa == "avx512_bf16" and dtype == ms.bfloat16
    return 2.0**-8 + 1.02e-4 if rounds else 0.0


def attention(
    query: np.ndarray,
    paged: Paged,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    causal: bool,
    share: float = 0.0,
    scaled: bool = False,
    sinks: np.ndarray | None = None,
) -> Bounded:
    """Row by row and head by head, in the order of the definition; `share` is from `share_error`.

    `scaled`: of a cache of int8, whose exact values `paged` has.
    """
    _, _, kv_heads, block_size, head_size = paged.cache.shape
    heads = query.reshape(len(query), query.shape[1] // head_size, head_size)
    values, error = np.zeros_like(heads), np.zeros_like(heads)
    for sequence, length in enumerate(paged.seq_lens):
        start, end = paged.query_start[sequence : sequence + 2]
        for row in range(start, end):
            position = row - end + length
            stop = position + 1 if causal else length
            attended = np.arange(0 if window is None else max(0, position - window + 1), stop)
            pages = paged.cache[paged.block_tables[sequence, attended // block_size], :, :, attended % block_size]
            for head in range(heads.shape[1]):
                kv = pages[:, :, head // (heads.shape[1] // kv_heads)]
                sink = None if sinks is None else sinks[head]
                pair = _attend(heads[row, head], kv[:, 0], kv[:, 1], scale, soft_cap, share, scaled, sink)
                values[row, head], error[row, head] = pair
    return values.reshape(query.shape), error.reshape(query.shape)


def _attend(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    scale: float,
    soft_cap: float | None,
    share: float,
    scaled: bool,
    sink: float | None,
) -> Bounded:
    """One head of one token.

    A score is off by (d + 2) u sum |q k| scale, and 32 u soft_cap for a tanh made of an exponential. A share
    exp(s - max) / sum is off by a relative e + mean(e), e being the errors of the score, of the maximum, of their
    difference and of the exponential, and the mean that over the shares; then come two sums of n positive terms.

    Probabilities p that are each off by a relative e_i, |e_i| <= `share`, and divided by their own sum give
    sum p_i (1 + e_i) v_i / sum p_i (1 + e_i). That is off by sum p_i e_i (v_i - w) / sum p_i (1 + e_i), w being the
    exact result: what all values have in common has no error.

    Scales of keys and of values (`scaled`) are one more product each. Probabilities are then summed before they are
    multiplied by the values' scales and rounded, so that this error, 2^-8 of each, does not cancel; that of the
    exponential does as before, and is at most twice 1.02e-4 of the values' magnitude.

    A `sink` is the score of one more position, whose value is 0; it is known but for a product with log2(e).
    """
    scores = keys @ query * scale
    off = (len(query) + 2 + scaled) * UNIT * (np.abs(keys) @ np.abs(query)) * abs(scale)
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
        off = off + 32 * UNIT * soft_cap
    if sink is not None:
        scores, off = np.append(scores, sink), np.append(off, 2 * UNIT * abs(sink))
        values = np.concatenate((values, np.zeros_like(values[:1])))
    below = scores.max() - scores
    shares = np.exp(-below)
    shares /= shares.sum()
    relative = off + off[scores.argmax()] + UNIT * np.abs(scores) + (65 + 9 * below) * UNIT
    relative = relative + shares @ relative + (2 * len(values) + 4 + scaled) * UNIT
    want = shares @ values
    if scaled and share:
        return want, (shares * (relative + share + 1.02e-4)) @ np.abs(values) * (1 + share)
    return want, (shares * relative) @ np.abs(values) + share / (1 - share) * (shares @ np.abs(values - want))


# --- strategies ------------------------------------------------------------------------------------------------

dtypes = st.sampled_from(DTYPES)
token_counts = st.sampled_from((0, 1, 2, 3, 5, 8, 17, 33))
widths = st.one_of(st.integers(1, 40), st.sampled_from((48, 64, 65, 127, 160, 257)))  # mostly no multiple of a vector
fused_sizes = st.lists(widths, min_size=1, max_size=3)
examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
scales = st.sampled_from((0.0, 1e-3, 1.0, 30.0))
seeds = st.integers(0, 2**32 - 1)


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: Any, scale: float = 1.0) -> np.ndarray:
    """Normal numbers that `dtype` holds exactly, in float64."""
    return rounded(rng.standard_normal(tuple(shape)) * scale, dtype)


@st.composite
def paged_sequences(
    draw: Any,
    rng: np.random.Generator,
    dtype: Any,
    kv_heads: int,
    head_size: int,
    window: Any,
    block_sizes: Sequence[int],
) -> Any:
    """A `Paged` of 0 to 4 sequences: prefill, chunked prefill, decode or no token at all.

    What must not be read is poison: table entries of blocks beyond a sequence or wholly before its window are no block
    at all or one of NaN, and so is what the cache holds beyond a sequence's length.
    """
    block_size = draw(st.sampled_from(block_sizes))
    queries = np.array(draw(st.lists(st.integers(0, 9), max_size=4)), np.int64)
    contexts = np.array([draw(st.sampled_from((0, 1, 3, 7, 16, 31, 60))) for _ in queries], np.int64)
    lengths = queries + contexts
    counts = -(-lengths // block_size)
    columns = int(counts.max(initial=0)) + draw(st.integers(0, 2))
    poison = draw(st.sampled_from((0, -1, 2**30)))
    order = rng.permutation(int(counts.sum())) + 1  # block 0 is NaN
    cache = np.full((len(order) + 1, 2, kv_heads, block_size, head_size), np.nan)
    tables = np.full((len(lengths), columns), poison)
    ends = np.cumsum(counts)
    for table, length, context, count, end in zip(tables, lengths, contexts, counts, ends, strict=True):
        table[:count] = order[end - count : end]
        for position in range(length):
            cache[table[position // block_size], :, :, position % block_size] = normal(
                rng, (2, kv_heads, head_size), dtype
            )
        if window is not None:
            table[: max(0, context - window + 1) // block_size] = poison
    starts = np.concatenate(([0], np.cumsum(queries)))
    return Paged(cache, *(array.astype(np.int32) for array in (starts, lengths, tables)))
