// Where keys and values lie in the paged cache; kv_cache.cpp explains it.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace vllm_ms {
namespace ISA_NS {

constexpr long kGroup = 16;  // positions of a panel of keys

// In bytes. Keys and values of a group of positions have the same offset in their halves of a block.
struct CacheLayout {
  long block_size, head_size;
  long group;  // kGroup positions of one head
  long head;   // a block's positions of one head
  long half;   // a block's keys of all heads; its values follow
  long block;
};

INLINE CacheLayout layout_of(long block_size, long head_size, long kv_heads, long width) {
  const long group = kGroup * head_size * width, head = block_size / kGroup * group;
  return {block_size, head_size, group, head, kv_heads * head, 2 * kv_heads * head};
}

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
