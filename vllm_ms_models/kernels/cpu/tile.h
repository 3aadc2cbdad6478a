// The micro-kernel: a block of R activation rows times P panels of 16 weight rows, accumulated in registers.
//
//        w: P panels, each [steps][16 lanes]     One step reads P panels x 16 weights (P cache lines for float32 or
//           +----+----+----+                     pairs of bf16) once and R activation values, each broadcast to all
//     step  | 16 | 16 | 16 |                     lanes, and does R x P x 16 multiply-adds. Nothing is reduced across
//           +----+----+----+                     lanes at the end: lane i of panel p *is* output feature 16 p + i.
//   x: R    |acc |acc |acc |
//      rows |acc |acc |acc |                     R x P x (16 / VW) accumulator registers
//
// There is exactly one such loop, `tile<W, R, P>`. W says how one step of a panel is stored and multiplied:
//
//   W        a step of a panel             activation              multiply-add
//   Float    16 float32                    float32                 FMA
//   Half     16 float16                    float32                 widen, FMA
//   Pairs    16 pairs (k, k+1) of bf16     2 float32               widen by shift and by mask, 2 FMA
//   Dots     16 pairs (k, k+1) of bf16     1 pair of bf16          vdpbf16ps (AVX-512 BF16 only)
//
// so bfloat16 weights have one layout for all instruction sets; weights of small integers have W's of their own
// (tile_integers.h), some with sums of integers. Panels need not be contiguous: `w_step` and `w_panel`
// are byte strides, so attention uses the same loop on tiles of K and V.
//
// Blocking. With VW = 16 there are 32 registers and 8 x 3 accumulators: a step is 3 loads and 8 broadcasts (folded into
// the multiply as a memory operand) for 24 multiply-adds, so the multipliers are the limit (1 per cycle on Zen 4,
// latency 4 to 6: any R x P >= 6 keeps them busy). With VW = 8 there are 16 registers and 4 x 1 panels: 8 accumulators,
// two vectors of weights and their widened halves (6 x 1 fits float32, but spills with bf16: 47 against 87 GFLOP/s).
// With VW = 4: 3 x 1. For one or two rows memory is the limit; there more panels at once hide the latency of the few
// accumulators, and the lines ahead are requested: 1 KB of each of 8 panels, into L2. Against 256 bytes into L1, one row of
// 4-bit weights takes 0.87 times as long at 35 GB/s, and of 8-bit weights 0.82 at 60 GB/s.
#pragma once

#include <type_traits>
#include <utility>

#include "simd.h"

namespace vllm_ms {
namespace ISA_NS {

#if VW == 16
constexpr int kRows = 8, kPanels = 3, kFewRows = 2, kFewPanels = 8;
#elif VW == 8
constexpr int kRows = 4, kPanels = 1, kFewRows = 1, kFewPanels = 4;
#elif defined(__aarch64__)
constexpr int kRows = 5, kPanels = 1, kFewRows = 1, kFewPanels = 4;
#else
constexpr int kRows = 3, kPanels = 1, kFewRows = 1, kFewPanels = 2;
#endif
constexpr int kMaxPanels = 2 * kPanels > kFewPanels ? 2 * kPanels : kFewPanels;
constexpr int kPrefetchBytes = 1024;  // of each panel

struct FusedMultiplyAdd {
  INLINE vf multiply_add(vf acc, float x, vf w) { return acc + x * w; }
};

struct Float : FusedMultiplyAdd {
  typedef float X;
  typedef vf Acc;
  typedef vf Raw;
  static constexpr int kDepth = 1;       // inputs per step
  static constexpr int kSubsteps = 1;    // X values per step
  static constexpr int kStepBytes = 64;  // of one panel
  INLINE vf widen(Raw raw, int) { return raw; }
};

struct Half : FusedMultiplyAdd {
  typedef float X;
  typedef vf Acc;
  typedef vh Raw;
  static constexpr int kDepth = 1, kSubsteps = 1, kStepBytes = 32;
  INLINE vf widen(Raw raw, int) { return from_f16(raw); }
};

struct Pairs : FusedMultiplyAdd {
  typedef float X;
  typedef vf Acc;
  typedef vu Raw;
  static constexpr int kDepth = 2, kSubsteps = 2, kStepBytes = 64;
  INLINE vf widen(Raw raw, int substep) { return (vf)(substep ? raw & 0xffff0000u : raw << 16); }
};

#if defined(__AVX512BF16__)
struct DotProduct {
  INLINE vf multiply_add(vf acc, uint32_t x, vu w) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)splat_bits(x), (__m512bh)w);
  }
};

struct Dots : DotProduct {
  typedef uint32_t X;
  typedef vf Acc;
  typedef vu Raw;
  static constexpr int kDepth = 2, kSubsteps = 1, kStepBytes = 64;
  INLINE vu widen(Raw raw, int) { return raw; }
};
#endif

// Where x is from now on: a compiler would rather read it again at each use, and has one read a cycle of 64 bytes.
template <class V>
INLINE void keep_in_register(V& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
}

// Type of one sum: float, or int32_t.
template <class W>
using Sum = std::remove_reference_t<decltype(std::declval<typename W::Acc&>()[0])>;

// Memory that will be needed soon: every step requests `lines` cache lines, `stride` bytes apart, and moves `move` bytes.
// One or two rows request what comes kPrefetchBytes later in their own panels, and `then` what follows the last steps.
struct Ahead {
  const char* at;
  int lines;
  long stride, move;
  const char* then;  // panels like those at work, or null
};

// out[r][16 p + i] (+)= sum over steps of x[r][step] * w[p][step][i]; strides of x and out in elements, of w in bytes.
template <class W, int R, int P>
static void tile(const typename W::X* x, long x_stride, const char* w, long w_step, long w_panel, long steps,
                 Sum<W>* out, long out_stride, bool accumulate, Ahead ahead) {
  typedef typename W::Acc Acc;
  constexpr int kPerPanel = 16 / VW, kVectors = P * kPerPanel;
  Acc acc[R][kVectors];
  UNROLL for (int r = 0; r < R; ++r) UNROLL
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = accumulate ? load_raw<Acc>(out + r * out_stride + v * VW) : Acc{};
  const char* soon = w + kPrefetchBytes;
  const long last = R <= kFewRows && ahead.then ? steps - kPrefetchBytes / W::kStepBytes : -1;
  for (long step = 0; step < steps; ++step) {
    if (step == last) soon = ahead.then;
    typename W::Raw raw[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v)
      raw[v] = load_raw<typename W::Raw>(w + v / kPerPanel * w_panel + v % kPerPanel * sizeof(raw[0]));
    if constexpr (R <= kFewRows && W::kSubsteps > 1) UNROLL
      for (int v = 0; v < kVectors; ++v) keep_in_register(raw[v]);
    if (R <= kFewRows) UNROLL
      for (int p = 0; p < P; ++p) __builtin_prefetch(soon + p * w_panel, 0, 2);
    else
      for (int i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.at + i * ahead.stride, 0, 2);
    ahead.at += ahead.move;
    UNROLL for (int s = 0; s < W::kSubsteps; ++s) {
      decltype(W::widen(raw[0], 0)) wide[kVectors];
      UNROLL for (int v = 0; v < kVectors; ++v)
        wide[v] = W::widen(raw[v], s);
      UNROLL for (int r = 0; r < R; ++r) {
        typename W::X value = load_raw<typename W::X>(x + r * x_stride + s);
        UNROLL for (int v = 0; v < kVectors; ++v)
          acc[r][v] = W::multiply_add(acc[r][v], value, wide[v]);
      }
    }
    x += W::kSubsteps;
    w += w_step, soon += w_step;
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL
    for (int v = 0; v < kVectors; ++v) store_raw(out + r * out_stride + v * VW, acc[r][v]);
}

template <class W>
using Tile = void (*)(const typename W::X*, long, const char*, long, long, long, Sum<W>*, long, bool, Ahead);

template <class W, int P, int R>
struct TileOf {
  static Tile<W> get(int rows) { return rows == R ? tile<W, R, P> : TileOf<W, P, R - 1>::get(rows); }
};
template <class W, int P>
struct TileOf<W, P, 0> {
  static Tile<W> get(int) { return nullptr; }
};

// The instance for `rows` (1 ... kRows) and `panels` (1, kPanels, or kFewPanels if rows <= kFewRows).
template <class W>
static Tile<W> find_tile(int rows, int panels) {
  if (panels == 1) return TileOf<W, 1, kRows>::get(rows);
  if (panels == kPanels) return TileOf<W, kPanels, kRows>::get(rows);
  return TileOf<W, kFewPanels, kFewRows>::get(rows);
}

// Rows per tile when `rows` are cut into the fewest tiles of nearly equal height: 9 rows are 5 + 4, not 8 + 1.
INLINE long tile_rows(long rows) { return ceil_div(rows, ceil_div(rows, kRows)); }

// out[rows][16 panels] (+)= x * w for any number of rows and panels.
template <class W>
static void multiply_block(const typename W::X* x, long x_stride, const char* w, long w_step, long w_panel, long steps,
                           float* out, long out_stride, bool accumulate, long rows, long panels) {
  long height = tile_rows(rows);
  for (long p = 0; p < panels;) {
    int width = panels - p >= kPanels ? kPanels : 1;
    for (long r = 0; r < rows; r += height)
      find_tile<W>(int(min(height, rows - r)), width)(x + r * x_stride, x_stride, w + p * w_panel, w_step, w_panel,
                                                      steps, out + r * out_stride + p * 16, out_stride, accumulate, {nullptr, 0, 0, 0, nullptr});
    p += width;
  }
}

}  // namespace ISA_NS
}  // namespace vllm_ms
