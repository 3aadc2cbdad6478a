// Rounding a row of floats to int8 by its largest magnitude: what products with int8 activations (quantize.h) and the
// cache of int8 (kv_cache.cpp) have in common. `Integers` in interface.py defines it.
//
// The largest magnitude is found as bits: of positive floats these are in the same order, infinity and NaN above all
// others. Each float32 operation is rounded by itself, so that any back end gets the same integers.
#pragma once

#include "simd.h"

namespace vllm_ms {
namespace ISA_NS {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;

template <class T>
INLINE vf load_padded(const T* x, long i, long count) {
  return i + VW <= count ? load(x + i) : load_some(x + i, count - i);
}

template <class T>
static uint32_t largest_bits(const T* x, long count) {
  vi most = {};
  for (long i = 0; i < count; i += VW) {
    const vi bits = (vi)magnitude(load_padded(x, i, count));
    most = bits > most ? bits : most;
  }
  UNROLL for (int distance = VW / 2; distance; distance /= 2) {
    const vi other = __builtin_shuffle(most, kLanes ^ distance);
    most = other > most ? other : most;
  }
  return uint32_t(most[0]);
}

// The integers of a row are its values times `factor`, to the nearest; times `scale` they are the values again.
struct RowScale {
  float factor, scale;
};

// From what `largest_bits` says, if that is finite.
INLINE RowScale row_scale(uint32_t bits) {
  const float largest = load_raw<float>(&bits), factor = 127.0f / largest;
  return {factor <= 3.4028235e38f ? factor : 0.0f, largest / 127.0f};
}

}  // namespace
}  // namespace ISA_NS
}  // namespace vllm_ms
