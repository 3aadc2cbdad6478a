// Where keys and values lie in the paged cache; kv_cache.cpp explains it.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace vllm_ms {
namespace ISA_NS {

constexpr long kGroup = 16;  // positions of a panel of keys

template <class S>
constexpr bool kIntegers = false;  // whether the cache has scales
template <>
constexpr bool kIntegers<int8_t> = true;

// In bytes. Keys and values of a group of positions have the same offset in their halves of a block, but for int8.
struct CacheLayout {
  long block_size, head_size;
  long group;  // kGroup positions of one head
  long reach;  // the same with their scales
  long head;   // a block's positions of one head, with their scales
  long half;   // a block's keys of all heads; its values follow
  long block;
};

// Of a cache of S.
template <class S>
INLINE CacheLayout layout_of(long block_size, long head_size, long kv_heads) {
  const long group = kGroup * head_size * long(sizeof(S)), reach = group + (kIntegers<S> ? kGroup * kScaleBytes : 0);
  const long head = block_size / kGroup * reach;
  return {block_size, head_size, group, reach, head, kv_heads * head, 2 * kv_heads * head};
}

// One head's keys (or, half a block on, values) in a block of int8, seen from where `offset` of its positions have
// passed; `offset` is a multiple of kGroup.
struct Piece {
  const CacheLayout& layout;
  char* base;
  long offset;

  char* keys() const { return base + offset * layout.head_size; }
  // Panel p of the features of the values; the last may have fewer than 16.
  char* values(long p) const {
    return base + layout.half + p * 16 * layout.block_size + offset * min(16, layout.head_size - p * 16);
  }
  char* key_scales() const { return base + layout.block_size * layout.head_size + offset * kScaleBytes; }
  char* value_scales() const { return key_scales() + layout.half; }
};

// Transposes a VW x VW matrix of 32-bit values held in VW registers: in each of log2(VW) stages, rows a distance apart
// exchange the off-diagonal blocks of that size.
INLINE void transpose(vi* rows) {
  UNROLL for (int distance = VW / 2; distance; distance /= 2) {
    const vi low = (kLanes & distance) ? kLanes + (VW - distance) : kLanes;
    const vi high = (kLanes & distance) ? kLanes + VW : kLanes + distance;
    UNROLL for (int i = 0; i < VW; ++i) {
      if (i & distance) continue;
      const vi a = rows[i], b = rows[i + distance];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + distance] = __builtin_shuffle(a, b, high);
    }
  }
}

}  // namespace ISA_NS
}  // namespace vllm_ms
