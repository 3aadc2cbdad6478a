// Attention's softmax: rows of scores to probabilities, a tile at a time. attention.cpp explains the whole.
#pragma once

#include "kernels.h"
#include "simd.h"

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

INLINE Softmax softmax_of(const AttentionCall& call) {
  constexpr float kLog2E = 1.44269504f;
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

static float top_score(const float* scores, long width) {
  vf top[16 / VW];
  UNROLL for (int u = 0; u < 16 / VW; ++u) top[u] = load(scores + u * VW);
  for (long i = 16; i < width; i += 16) UNROLL
    for (int u = 0; u < 16 / VW; ++u) top[u] = vmax(load(scores + i + u * VW), top[u]);
  UNROLL for (int u = 1; u < 16 / VW; ++u) top[0] = vmax(top[0], top[u]);
  return largest(top[0]);
}

// Probabilities 2^(score * factor - top), in place; returns their sum.
static float soften(float* scores, long width, float factor, float top, float*) {
  vf total = {};
  for (long i = 0; i < width; i += VW) {
    const vf p = power_of_two(load(scores + i) * factor - top);
    total += p;
    store(scores + i, p);
  }
  return sum(total);
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

// The same, rounded to bf16, packed at the beginning of the row. The sum is that of the rounded values.
static float soften(float* scores, long width, float factor, float top, uint32_t*) {
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
  return sum((vf)total);
}
#endif

// Turns one row of scores, visible in [low, high), into probabilities relative to the running maximum m; l is their
// sum. Returns the factor by which everything summed so far has to be multiplied.
template <class X>
static float soften_row(float* scores, long low, long high, long width, const Softmax& softmax, float& m, float& l) {
  if (softmax.transform) transform_scores(scores, width, softmax);
  if (low > 0 || high < width) mask_scores(scores, low, high, width);
  const float found = top_score(scores, width) * softmax.factor, next = found > m ? found : m;
  X* none = nullptr;
  const float total = soften(scores, width, softmax.factor, next == kNegative ? 0.0f : next, none);
  const float shrink = m == next ? 1.0f : power_of_two(splat(m - next))[0];
  l = l * shrink + total;
  m = next;
  return shrink;
}

}  // namespace ISA_NS
}  // namespace vllm_ms
