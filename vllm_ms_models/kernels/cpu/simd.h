// Vectors of float32, conversions to and from the storage types, and the elementary functions.
//
// Every source that includes this header is compiled once per instruction set, with different -m flags and a different
// ISA_NS; nothing in it names an instruction set except the conversions and the bfloat16 dot product, which GCC cannot
// express otherwise. Vectors are GCC vector extensions as wide as the machine's registers:
//
//   ISA_NS        flags                         VW (float32 lanes)
//   avx512_bf16   -mavx512{f,bw,dq,vl,vnni,bf16} 16
//   avx512_vnni   -mavx512{f,bw,dq,vl,vnni}      16
//   avx512        -mavx512{f,bw,dq,vl}          16
//   avx2          -mavx2 -mfma -mf16c            8
//   portable      (x86-64 or AArch64 baseline)   4
//
// Wider vectors than the registers would be lowered by GCC too, but through memory as soon as more than a few are live.
//
// These sources must not instantiate anything with external linkage from the standard library (std::vector, std::sort):
// the linker keeps one copy of such a function for all instruction sets, and it might be the AVX-512 one.
//
// Storage types: `float`, `Bf16` and `F16` (16 raw bits). `load<T>` and `store<T>` convert VW values; `load_some` and
// `store_some` handle the first n < VW. Rounding is to nearest, ties to even; NaN stays NaN; denormals are kept.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "threads.h"

#ifndef ISA_NS
#error "ISA_NS must name the namespace of the instruction set"
#endif

#if defined(__AVX512F__)
#define VW 16
#elif defined(__AVX2__)
#define VW 8
#else
#define VW 4
#endif

#define UNROLL _Pragma("GCC unroll 32")
#define INLINE static inline __attribute__((always_inline))

namespace vllm_ms {
namespace ISA_NS {

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint16_t vh __attribute__((vector_size(VW * 2)));
typedef int8_t vb __attribute__((vector_size(VW)));

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

INLINE long min(long a, long b) { return a < b ? a : b; }
INLINE long max(long a, long b) { return a > b ? a : b; }
INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }

template <class V>
INLINE V load_raw(const void* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}
template <class V>
INLINE void store_raw(void* to, V v) {
  memcpy(to, &v, sizeof(V));
}
INLINE vf splat(float x) { return x - vf{}; }
INLINE vu splat_bits(uint32_t x) { return x - vu{}; }
INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

#if VW == 16
constexpr vi kLanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif VW == 8
constexpr vi kLanes = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr vi kLanes = {0, 1, 2, 3};
#endif

// Over all lanes, by halves.
INLINE float sum(vf v) {
  UNROLL for (int distance = VW / 2; distance; distance /= 2)
    v += __builtin_shuffle(v, kLanes ^ distance);
  return v[0];
}
INLINE int32_t sum(vi v) {
  int32_t total = 0;
  for (int i = 0; i < VW; ++i) total += v[i];
  return total;
}
INLINE float largest(vf v) {
  UNROLL for (int distance = VW / 2; distance; distance /= 2)
    v = vmax(v, __builtin_shuffle(v, kLanes ^ distance));
  return v[0];
}

// --- conversions ----------------------------------------------------------------------------------------------------

// GCC converts between vectors of different widths by halves; the instructions do it at once.
#if defined(__AVX512F__)
INLINE vf from_bf16(vh bits) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16); }
#elif defined(__AVX2__)
INLINE vf from_bf16(vh bits) { return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16); }
#else
INLINE vf from_bf16(vh bits) { return (vf)(__builtin_convertvector(bits, vu) << 16); }
#endif

INLINE vh to_bf16_by_integers(vf x) {
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector((x == x) ? rounded : quiet, vh);
}
#if defined(__AVX512BF16__)
INLINE vh to_bf16(vf x) {
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)x, 0x20), 0)) return to_bf16_by_integers(x);  // denormals
  return (vh)_mm512_cvtneps_pbh((__m512)x);  // would make them 0; NaN comes out as above
}
#else
INLINE vh to_bf16(vf x) { return to_bf16_by_integers(x); }
#endif

#if defined(__AVX512F__)
INLINE vf from_f16(vh bits) { return (vf)_mm512_cvtph_ps((__m256i)bits); }
INLINE vh to_f16(vf x) { return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(__F16C__)
INLINE vf from_f16(vh bits) { return (vf)_mm256_cvtph_ps((__m128i)bits); }
INLINE vh to_f16(vf x) { return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
// The exponent and fraction are shifted into place and rescaled by 2^112, which also normalises denormals.
INLINE vf from_f16(vh half) {
  vu bits = __builtin_convertvector(half, vu);
  vu magnitude = bits & 0x7fff;
  vf scaled = (vf)(magnitude << 13) * 0x1p112f;
  vu value = (magnitude >= splat_bits(0x7c00)) ? ((magnitude << 13) | 0x7f800000) : (vu)scaled;
  return (vf)(value | ((bits & 0x8000) << 16));
}
// Normal results round by integer addition with carry into the exponent; denormal ones by adding 0.5, whose last bit is
// worth 2^-24, the half's smallest denormal.
INLINE vh to_f16(vf x) {
  vu bits = (vu)x, sign = bits & 0x80000000u, magnitude = bits ^ sign;
  vu normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  vu denormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
  vu half = (magnitude < splat_bits(113u << 23)) ? denormal : normal;
  half = (magnitude >= splat_bits(143u << 23)) ? splat_bits(0x7c00) : half;
  half = (magnitude > splat_bits(0x7f800000u)) ? splat_bits(0x7e00) : half;
  return __builtin_convertvector(half | (sign >> 16), vh);
}
#endif

#if defined(__AVX512F__)
INLINE vf from_int8(vb bytes) { return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes)); }
INLINE vb to_int8(vi x) { return (vb)_mm512_cvtepi32_epi8((__m512i)x); }  // the low bits
#elif defined(__AVX2__)
INLINE vf from_int8(vb bytes) {
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_raw<long long>(&bytes))));
}
INLINE vb to_int8(vi x) { return __builtin_convertvector(x, vb); }
#else
INLINE vf from_int8(vb bytes) { return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf); }
INLINE vb to_int8(vi x) { return __builtin_convertvector(x, vb); }
#endif

// To the nearest integers, ties to even. Not by adding 1.5 * 2^23: the compiler may fuse that with a product before it,
// which then is not rounded.
#if defined(__AVX512F__)
INLINE vi to_integers(vf x) { return (vi)_mm512_cvtps_epi32((__m512)x); }
#elif defined(__AVX2__)
INLINE vi to_integers(vf x) { return (vi)_mm256_cvtps_epi32((__m256)x); }
#elif defined(__SSE2__)
INLINE vi to_integers(vf x) { return (vi)_mm_cvtps_epi32((__m128)x); }
#elif defined(__aarch64__)
INLINE vi to_integers(vf x) { return (vi)vcvtnq_s32_f32((float32x4_t)x); }
#else
INLINE vi to_integers(vf x) {
  vi result;
  for (int i = 0; i < VW; ++i) result[i] = int32_t(__builtin_rintf(x[i]));
  return result;
}
#endif

INLINE vf load(const float* from) { return load_raw<vf>(from); }
INLINE vf load(const Bf16* from) { return from_bf16(load_raw<vh>(from)); }
INLINE vf load(const F16* from) { return from_f16(load_raw<vh>(from)); }
INLINE void store(float* to, vf x) { store_raw(to, x); }
INLINE void store(Bf16* to, vf x) { store_raw(to, to_bf16(x)); }
INLINE void store(F16* to, vf x) { store_raw(to, to_f16(x)); }

template <class T>
INLINE vf load_some(const T* from, long n) {
  T lanes[VW] = {};
  memcpy(lanes, from, size_t(n) * sizeof(T));
  return load(lanes);
}
template <class T>
INLINE void store_some(T* to, vf x, long n) {
  T lanes[VW];
  store(lanes, x);
  memcpy(to, lanes, size_t(n) * sizeof(T));
}

// Single values, for tails and scattered elements.
template <class T>
INLINE float load_one(const T* from) {
  return load_some(from, 1)[0];
}
INLINE float load_one(const float* from) { return *from; }
INLINE float load_one(const Bf16* from) {
  uint32_t bits = uint32_t(from->bits) << 16;
  return load_raw<float>(&bits);
}
template <class T>
INLINE void store_one(T* to, float x) {
  store_some(to, splat(x), 1);
}
INLINE void store_one(float* to, float x) { *to = x; }

// --- elementary functions -------------------------------------------------------------------------------------------

// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln(2)/2; e^r by a polynomial with a relative error of 3e-9, so that
// rounding dominates: at most about 1 ulp. Underflows to denormals and 0, overflows to infinity, keeps NaN.
INLINE vf exponential(vf x) {
#if defined(__AVX512F__)
  x = (vf)_mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x));  // NaN: the second
  vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
#else
  x = x < -104.0f ? splat(-104.0f) : x;
  x = x > 89.0f ? splat(89.0f) : x;
  vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
#endif
  vf r = x - n * 0.693359375f;  // exact: the constant has 10 bits
  r = r + n * 2.12194440e-4f;
  vf p = r * 0.0013814467f + 0.0083687808f;
  p = p * r + 0.0416683927f;
  p = p * r + 0.166665196f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi whole = __builtin_convertvector(n, vi), half = whole >> 1;  // two factors: 2^n alone may not be representable
  return p * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
#endif
}

// 2^x for x <= 0, relative error about 1e-7 plus the polynomial's 2e-9: for softmax, where anything below 2^-127 may as
// well be 0. Keeps NaN. The sum with 1.5 * 2^23 holds the rounded exponent in its low bits; at -127 the polynomial is
// exactly 1 and its exponent becomes that of 0.
INLINE vf power_of_two(vf x) {
  x = x < -127.0f ? splat(-127.0f) : x;
  vf shifted = x + 12582912.0f;
  vf r = x - (shifted - 12582912.0f);
  vf p = r * 0.000153533620f + 0.00133988750f;
  p = p * r + 0.00961843692f;
  p = p * r + 0.0555033237f;
  p = p * r + 0.240226477f;
  p = p * r + 0.693147182f;
  p = p * r + 1.0f;
  return (x == x) ? (vf)((vi)p + ((vi)shifted << 23)) : x;
}

INLINE vf magnitude(vf x) { return (vf)((vu)x & 0x7fffffffu); }
INLINE vf copy_sign(vf to, vf from) { return (vf)(((vu)to & 0x7fffffffu) | ((vu)from & 0x80000000u)); }

// Odd polynomial below 0.625 (relative error 4e-9), 1 - 2 / (e^2x + 1) above.
INLINE vf hyperbolic_tangent(vf x) {
  vf a = magnitude(x), z = x * x;
  vf p = z * -0.0057170447f + 0.0206505861f;
  p = p * z - 0.0537434965f;
  p = p * z + 0.133314908f;
  p = p * z - 0.333332837f;
  vf small = x + x * (z * p);
  vf big = copy_sign(1.0f - 2.0f / (exponential(a + a) + 1.0f), x);
  return (a >= 0.625f) ? big : small;  // NaN takes the polynomial and stays NaN
}

INLINE vf silu(vf x) { return x / (1.0f + exponential(-x)); }

// x * (1 + tanh(u)) / 2 = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3): no cancellation for negative x.
INLINE vf gelu_tanh(vf x) {
  vf u = x * (1.0f + 0.044715f * x * x);
  return x / (1.0f + exponential(-1.5957691216f * u));
}

// x * Phi(x). The upper tail q(a) = Phi(-a) = e^(-a^2/2) g(a); g is a polynomial in 1 / (1 + 0.35 a), fitted to a
// relative error of 3e-8 for a <= 14.5 (q is 0 in float32 beyond). a^2 is split into an exact and a small part, or its
// rounding error would be multiplied by a^2 / 2. Relative error about 4e-7 in the negative tail, 1e-7 elsewhere.
INLINE vf gelu_erf(vf x) {
  vf a = magnitude(x);
  a = a > 14.5f ? splat(14.5f) : a;
  vf t = 1.0f / (1.0f + 0.35f * a);
  static const float kTail[] = {-1.4545949e-06f, 0.139653593f, 0.139561534f,  0.121385790f, 0.100591920f,
                                -0.0131979408f,  0.146403044f, -0.245539442f, 0.139408335f, -0.0282653887f};
  vf g = splat(kTail[9]);
  UNROLL for (int i = 8; i >= 0; --i)
    g = g * t + kTail[i];
  vf head = (vf)((vu)a & 0xfffff000u);
  vf q = exponential(-0.5f * head * head) * exponential(-0.5f * (a - head) * (a + head)) * g;
  return (x > 0.0f) ? x - x * q : x * q;
}

// --- parallel loops -------------------------------------------------------------------------------------------------

// body(chunk, thread) for every chunk, on several threads.
template <class Body>
static void parallel(long chunks, const Body& body) {
  run_chunks(
      chunks, [](void* context, long chunk, int thread) { (*static_cast<const Body*>(context))(chunk, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// body(begin, end) over [0, count), in ranges worth a hand-over: `cost` is the work of one item in bytes touched, and
// below 2 * kWorthwhile (about 3 us) everything stays on this thread.
template <class Body>
static void parallel_ranges(long count, long cost, const Body& body) {
  constexpr long kWorthwhile = 32 * 1024;
  long pieces = min(min(count, count * cost / kWorthwhile), 4L * thread_count());
  if (pieces <= 1) {
    if (count > 0) body(0L, count);
    return;
  }
  parallel(pieces, [&](long piece, int) { body(count * piece / pieces, count * (piece + 1) / pieces); });
}

}  // namespace ISA_NS
}  // namespace vllm_ms
