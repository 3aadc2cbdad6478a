// Attention's softmax: rows of scores to probabilities, a tile at a time. attention.cpp explains the whole.
#pragma once

#include "kernels.h"
#include "tile.h"

namespace vllm_ms {
namespace ISA_NS {

constexpr float kNegative = -__builtin_inff();

// How scores become exponents of two: the running maximum is kept in these units, so that a probability is
// 2^(score * factor - maximum), one multiply-add and a power of two.
struct Softmax {
  float scale, cap;  // cap 0: none
  bool transform;    // scores are scaled and capped in a pass of their own, `factor` is log2(e)
  float factor;      // scale * log2(e) otherwise
};

constexpr float kLog2E = 1.44269504f;

INLINE Softmax softmax_of(const AttentionCall& call) {
  const bool transform = call.soft_cap > 0 || !(call.scale > 0);
  return {float(call.scale), float(call.soft_cap), transform,
          transform ? kLog2E : float(call.scale * 1.4426950408889634)};
}

static void transform_scores(float* scores, long width, const Softmax& softmax) {
  for (long i = 0; i < width; i += VW) {
    vf s = load(scores + i) * softmax.scale;
    if (softmax.cap > 0) s = softmax.cap * hyperbolic_tangent(s / softmax.cap);
    store(scores + i, s);
  }
}

// Scores outside of [low, high) become -inf; vectors wholly inside are not touched.
static void mask_scores(float* scores, long low, long high, long width) {
  auto mask = [&](long i) {
    const vi at = kLanes + int(i);
    store(scores + i, select((at >= int(low)) & (at < int(high)), load(scores + i), splat(kNegative)));
  };
  for (long i = 0; i < width && i < low; i += VW) mask(i);
  for (long i = high < 0 ? 0 : high / VW * VW; i < width; i += VW) mask(i);
}

// Lane by lane.
static vf top_scores(const float* scores, long width) {
  vf top[16 / VW];
  UNROLL for (int u = 0; u < 16 / VW; ++u) top[u] = load(scores + u * VW);
  for (long i = 16; i < width; i += 16) UNROLL
    for (int u = 0; u < 16 / VW; ++u) top[u] = vmax(load(scores + i + u * VW), top[u]);
  UNROLL for (int u = 1; u < 16 / VW; ++u) top[0] = vmax(top[0], top[u]);
  return top[0];
}

// Probabilities 2^(score * factor - top), in place; returns their sums, lane by lane. The last argument says as what
// they will be multiplied.
static vf soften(float* scores, long width, float factor, float top, float*) {
  vf total = {};
  for (long i = 0; i < width; i += VW) {
    const vf p = power_of_two(load(scores + i) * factor - top);
    total += p;
    store(scores + i, p);
  }
  return total;
}

// Probabilities that have yet to be multiplied by scales: float32 for now.
template <class X>
struct Unscaled {};
static vf soften(float* scores, long width, float factor, float top, Unscaled<float>*) {
  return soften(scores, width, factor, top, static_cast<float*>(nullptr));
}

#if defined(__AVX512BF16__)
// 2^x with a relative error of 1.0e-4, for what is rounded to 8 bits: |r| <= 1/2 and a polynomial of degree 3. Far
// below 2^-126 it is 0, and NaN stays NaN (the order of the operands of max matters).
INLINE __m512 short_power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
  const __m512 p = ((r * 0.05500896f + 0.24221103f) * r + 0.69328293f) * r + 1.0f;
  return _mm512_scalef_ps(p, n);
}

// The same, to be multiplied by the scales of their values before they are rounded to bf16.
static vf soften(float* scores, long width, float factor, float top, Unscaled<uint32_t>*) {
  __m512 total = _mm512_setzero_ps();
  for (long i = 0; i < width; i += 16) {
    const __m512 p = short_power_of_two((__m512)(load(scores + i) * factor - top));
    total = _mm512_add_ps(total, p);
    store(scores + i, (vf)p);
  }
  return (vf)total;
}

// Probabilities rounded to bf16, packed at the beginning of the row. The sums are those of the rounded values.
static vf soften(float* scores, long width, float factor, float top, uint32_t*) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  __m512 total = _mm512_setzero_ps();
  char* to = reinterpret_cast<char*>(scores);
  auto power = [&](long i) { return short_power_of_two((__m512)(load(scores + i) * factor - top)); };
  long i = 0;
  for (; i + 32 <= width; i += 32) {
    const __m512bh p = _mm512_cvtne2ps_pbh(power(i + 16), power(i));
    total = _mm512_dpbf16_ps(total, p, ones);
    store_raw(to + i * 2, p);
  }
  if (i < width) {
    const __m512bh p = _mm512_cvtne2ps_pbh(_mm512_setzero_ps(), power(i));
    total = _mm512_dpbf16_ps(total, p, ones);
    store_raw(to + i * 2, p);
  }
  return (vf)total;
}
#endif

// --- a cache of int8 -------------------------------------------------------------------------------------------------

INLINE vf load_scales(const char* from, long i) { return load_raw<vf>(from + i * long(sizeof(float))); }

// `count` rows of scores of `width` positions, `stride` apart, times the scales of their keys.
INLINE void scale_scores(float* scores, long stride, int count, long width, const char* scales) {
  for (long i = 0; i < width; i += VW) {
    const vf scale = load_scales(scales, i);
    for (float* row = scores + i; row < scores + count * stride; row += stride) store(row, load(row) * scale);
  }
}

// A probability times the scale of its value; 0 stays 0, since the scale of what is not attended to may be NaN.
INLINE vf scaled_share(const float* share, vf scale) {
  const vf p = load(share);
  return select(p == vf{}, p, p * scale);
}

// Rows of probabilities times the scales of their values, as they are multiplied, at the same place.
INLINE void scale_shares(float* shares, long stride, int count, long width, const char* scales, float*) {
  for (long i = 0; i < width; i += VW) {
    const vf scale = load_scales(scales, i);
    for (float* row = shares + i; row < shares + count * stride; row += stride) store(row, scaled_share(row, scale));
  }
}
#if defined(__AVX512BF16__)
INLINE void scale_shares(float* shares, long stride, int count, long width, const char* scales, uint32_t*) {
  long i = 0;
  for (; i + 32 <= width; i += 32) {
    const vf low = load_scales(scales, i), high = load_scales(scales, i + 16);
    for (float* row = shares; row < shares + count * stride; row += stride)
      store_raw(row + i / 2, _mm512_cvtne2ps_pbh((__m512)scaled_share(row + i + 16, high),
                                                 (__m512)scaled_share(row + i, low)));
  }
  if (i == width) return;
  const vf low = load_scales(scales, i);
  for (float* row = shares; row < shares + count * stride; row += stride)
    store_raw(row + i / 2, _mm512_cvtne2ps_pbh(_mm512_setzero_ps(), (__m512)scaled_share(row + i, low)));
}
#endif

// Lane i of the result is `combine` over all lanes of rows[i]: a transposition that combines instead of keeping.
template <class Combine>
INLINE vf across(vf* rows, const Combine& combine) {
  UNROLL for (int distance = VW / 2; distance; distance /= 2) {
    const vi low = (kLanes & distance) ? kLanes + (VW - distance) : kLanes;
    const vi high = (kLanes & distance) ? kLanes + VW : kLanes + distance;
    UNROLL for (int i = 0; i < distance; ++i)
      rows[i] = combine(__builtin_shuffle(rows[i], rows[i + distance], low),
                        __builtin_shuffle(rows[i], rows[i + distance], high));
  }
  return rows[0];
}

constexpr int kBlockLanes = (kRows + VW - 1) / VW * VW;  // rows of a block in whole vectors

// What is known of the rows of a block: running maximum, running sum, and by what everything summed so far has to be
// multiplied.
struct RowStates {
  float m[kBlockLanes], l[kBlockLanes], shrink[kBlockLanes];
};

// Turns `count` rows of scores, kKeys apart and -inf where not visible, into probabilities relative to the running
// maxima. Maxima and sums are taken of all rows at once. X: see `soften`.
template <class X>
static void soften_rows(float* scores, long stride, int count, long width, float factor, RowStates& states) {
  float tops[kBlockLanes];
  vf rows[kBlockLanes];
  for (int r = 0; r < kBlockLanes; ++r) rows[r] = r < count ? top_scores(scores + r * stride, width) : splat(kNegative);
  for (int r = 0; r < kBlockLanes; r += VW) {
    const vf m = load(states.m + r);
    const vf next = vmax(across(rows + r, [](vf a, vf b) { return vmax(a, b); }) * factor, m);
    store(tops + r, next == splat(kNegative) ? vf{} : next);  // all visible scores are NaN or -inf
    store(states.shrink + r, m == next ? splat(1.0f) : power_of_two(m - next));
    store(states.m + r, next);
  }
  X* none = nullptr;
  for (int r = 0; r < kBlockLanes; ++r)
    rows[r] = r < count ? soften(scores + r * stride, width, factor, tops[r], none) : vf{};
  for (int r = 0; r < kBlockLanes; r += VW)
    store(states.l + r,
          load(states.l + r) * load(states.shrink + r) + across(rows + r, [](vf a, vf b) { return a + b; }));
}

}  // namespace ISA_NS
}  // namespace vllm_ms
