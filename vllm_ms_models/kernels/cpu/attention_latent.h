// A tile of latents, for multi-head latent attention: rows of the cache, one for each position and all heads, that are
// keys as they are and values in their first part. attention.cpp explains the tiles.
//
// The cache is [num_blocks][block_size][width], so that a position costs its `width` values and nothing else. Both
// products want them in another order (keys in panels of 16 positions, values of bfloat16 in pairs of positions), so a
// tile is always copied, once for all rows of an item: VW x VW transpositions, about as many cycles as a micro-kernel
// call of a few rows. An item has all heads of a token, 16 to 128 rows.
#pragma once

#include "kernels.h"
#include "kv_cache.h"
#include "simd.h"

namespace vllm_ms {
namespace ISA_NS {

// Units of 32 bits: what keys are made of as they will be multiplied, a float32 or a pair of bfloat16.
template <class X>
constexpr long kInUnit = 1;
template <>
constexpr long kInUnit<uint32_t> = 2;

template <class T>
INLINE vi load_units(const T* from, float*) {
  return (vi)load(from);
}
INLINE vi load_units(const Bf16* from, uint32_t*) { return load_raw<vi>(from); }

template <class T>
INLINE float load_unit(const T* from, long, float*) {
  return load_one(from);
}
INLINE uint32_t load_unit(const Bf16* from, long left, uint32_t*) {
  uint32_t unit = 0;
  memcpy(&unit, from, left > 1 ? 4 : 2);
  return unit;
}

// Keys [steps][16] of the first `count` of 16 rows; the others (which may hold anything) as zeros.
template <class T, class X>
static void copy_latent_keys(const T* rows, X* to, long width, long count) {
  constexpr long kEach = kInUnit<X>;
  X* none = nullptr;
  long d = 0;
  for (; d + VW * kEach <= width; d += VW * kEach)
    for (long lane = 0; lane < kGroup; lane += VW) {
      vi units[VW];
      UNROLL for (int i = 0; i < VW; ++i)
        units[i] = lane + i < count ? load_units(rows + (lane + i) * width + d, none) : vi{};
      transpose(units);
      UNROLL for (int i = 0; i < VW; ++i)
        store_raw(to + (d / kEach + i) * kGroup + lane, units[i]);
    }
  for (; d < width; d += kEach)
    for (long lane = 0; lane < kGroup; ++lane)
      to[d / kEach * kGroup + lane] = lane < count ? load_unit(rows + lane * width + d, width - d, none) : X(0);
}

// Values [16][padded], the first `size` features of each row.
template <class T>
static void copy_latent_values(const T* rows, float* to, long width, long size, long padded, long count) {
  for (long lane = 0; lane < kGroup; ++lane, rows += width, to += padded) {
    long d = 0;
    for (; lane < count && d + VW <= size; d += VW) store(to + d, load(rows + d));
    for (; d < padded; ++d) to[d] = lane < count && d < size ? load_one(rows + d) : 0.0f;
  }
}
// The same in pairs of positions, [8][padded].
static void copy_latent_values(const Bf16* rows, uint32_t* to, long width, long size, long padded, long count) {
  for (long lane = 0; lane < kGroup; lane += 2, rows += 2 * width, to += padded) {
    const Bf16* odd = rows + width;
    const bool first = lane < count, second = lane + 1 < count;
    long d = 0;
    for (; d + VW <= size; d += VW) {
      const vu low = first ? __builtin_convertvector(load_raw<vh>(rows + d), vu) : vu{};
      const vu high = second ? __builtin_convertvector(load_raw<vh>(odd + d), vu) : vu{};
      store_raw(to + d, low | (high << 16));
    }
    for (; d < padded; ++d) {
      uint16_t low = 0, high = 0;
      if (first && d < size) memcpy(&low, rows + d, 2);
      if (second && d < size) memcpy(&high, odd + d, 2);
      to[d] = low | uint32_t(high) << 16;
    }
  }
}

}  // namespace ISA_NS
}  // namespace vllm_ms
