// Rounding rows of activations to int8, and what the products need to know of them besides. Part of gemm_integers.cpp.
//
// Two passes over a row, which is in L1 or L2 after the first: the largest magnitude (rounding.h), then 16 values at a
// time scaled, rounded, narrowed, summed. Rows are spread over the threads; 1024 rows of 896 bf16 take 2% of the time of
// the product with 1152 outputs.
//
// Integers are stored as the micro-kernel multiplies them: bytes for vpdpbusd; for pmaddwd int16 in the order k, k + 2,
// k + 1, k + 3 (tile_integers.h).
#pragma once

#include "kernels.h"
#include "rounding.h"
#include "tile_integers.h"

namespace vllm_ms {
namespace ISA_NS {
namespace {

#if defined(__AVX512VNNI__)
constexpr long kRoundedBytes = 1;  // of an integer
INLINE void store_rounded(char* to, vi x) { store_raw(to, to_int8(x)); }
#else
constexpr long kRoundedBytes = 2;
INLINE void store_rounded(char* to, vi x) {
  typedef int16_t vs __attribute__((vector_size(VW * 2)));
  const vi order = (kLanes & ~3) | ((kLanes & 1) << 1) | ((kLanes & 2) >> 1);
  store_raw(to, __builtin_convertvector(__builtin_shuffle(x, order), vs));
}
#endif

// Bytes from one rounded row to the next: whole vectors, and an odd number of cache lines, so that the rows that one
// micro-kernel call reads side by side lie in different sets of the cache.
INLINE long rounded_stride(long in_features) { return (ceil_div(in_features * kRoundedBytes, 64) | 1) * 64; }

// One row's result.
struct Rounded {
  float scale;
  int32_t total;
};

// `x` times `factor`, rounded; with an offset also clipped to int8.
template <bool kOffset, class T>
static int32_t round_row(const T* x, long count, float factor, int offset, char* to) {
  vi total = {};
  for (long i = 0; i < count; i += VW) {
    vf scaled = load_padded(x, i, count) * factor;
    if (kOffset) scaled = vmin(vmax(scaled, splat(-512.0f)), splat(512.0f));
    vi rounded = to_integers(scaled);
    if (kOffset) {
      rounded += offset;
      rounded = rounded < -128 ? vi{} - 128 : rounded;
      rounded = rounded > 127 ? vi{} + 127 : rounded;
      if (i + VW > count) rounded &= kLanes < int32_t(count - i);
    }
    total += rounded;
    store_rounded(to + i * kRoundedBytes, rounded);
  }
  return sum(total);
}

// As `Integers` in interface.py defines it.
template <class T>
static Rounded quantize_row(const T* x, const Packed& weight, int part, char* to) {
  const long count = weight.in_features;
  const uint32_t bits = largest_bits(x, count);
  if (bits >= kInfinityBits) {
    memset(to, 0, size_t(rounded_stride(count)));
    return {__builtin_nanf(""), 0};
  }
  if (weight.input == Input::kStatic) {
    const float factor = 1.0f / weight.input_scale[part];
    return {1.0f, round_row<true>(x, count, factor, weight.input_offset[part], to)};
  }
  const RowScale by = row_scale(bits);
  return {by.scale, round_row<false>(x, count, by.factor, 0, to)};
}

// `rows` rows from `x`; scales and totals go to arrays.
template <class T>
static void quantize_rows(const T* x, const Packed& weight, int part, long rows, char* to, float* scale,
                          int32_t* total) {
  const long count = weight.in_features, stride = rounded_stride(count);
  parallel_ranges(rows, count * 8, [&](long begin, long end) {
    for (long row = begin; row < end; ++row) {
      const Rounded result = quantize_row(x + row * count, weight, part, to + row * stride);
      scale[row] = result.scale;
      total[row] = result.total;
    }
  });
}

// Sums of the activations of each group of each row, for zero points.
template <class T>
static void sum_groups(const T* x, const Packed& weight, long rows, float* to) {
  const long count = weight.in_features, size = weight.groups > 1 ? weight.group_size : count;
  parallel_ranges(rows, count * 8, [&](long begin, long end) {
    for (long row = begin; row < end; ++row)
      for (long group = 0; group < weight.groups; ++group) {
        const T* from = x + row * count + group * size;
        const long n = min(size, count - group * size);
        vf total = {};
        for (long i = 0; i < n; i += VW) total += load_padded(from, i, n);
        to[row * weight.groups + group] = sum(total);
      }
  });
}

}  // namespace
}  // namespace ISA_NS
}  // namespace vllm_ms
