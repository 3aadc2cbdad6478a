// Attention's tiles: one thread's buffers, and keys and values on their way from the paged cache into panels.
// attention.cpp explains the whole.
#pragma once

#include "kernels.h"
#include "tile.h"

namespace vllm_ms {
namespace ISA_NS {

constexpr long kKeys = 128;  // positions of a tile

struct Geometry {
  long group, head_size, padded;  // padded: head_size up to a multiple of 16
  long row_bytes, half_bytes, block_bytes;
};

// One thread's buffers for an item.
struct Buffers {
  char* query;    // [rows][depth] float32, or pairs of bf16
  char* keys;     // [kKeys / 16][depth][16]
  float* values;  // [kKeys][padded]
  float* scores;  // [rows][kKeys]
  float* out;     // [rows][padded]
  float* m;
  float* l;
};

static bool take_buffers(const Geometry& g, long rows, Buffers& b) {
  const long depth = (g.head_size + 1) / 2 * 2 * 4;  // bytes of a row; pairs need half of it
  const long sizes[] = {rows * depth, kKeys * depth, kKeys * g.padded * 4, rows * kKeys * 4, rows * g.padded * 4,
                        rows * 4,     rows * 4};
  long total = 0, offset[7];
  for (int i = 0; i < 7; ++i) {
    offset[i] = total;
    total += ceil_div(sizes[i], 64) * 64;
  }
  char* base = static_cast<char*>(scratch(Slot::kAttention, size_t(total)));
  if (!base) return false;
  b = {base + offset[0],
       base + offset[1],
       reinterpret_cast<float*>(base + offset[2]),
       reinterpret_cast<float*>(base + offset[3]),
       reinterpret_cast<float*>(base + offset[4]),
       reinterpret_cast<float*>(base + offset[5]),
       reinterpret_cast<float*>(base + offset[6])};
  return true;
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

// How the scores are multiplied: which micro-kernel, and how a row of q or k is stored for it.
template <class T>
struct FloatScores {
  typedef Float W;
  static long depth(long head_size) { return head_size; }
  INLINE vi read(const T* row, long d) { return (vi)load(row + d); }
  INLINE int32_t read_one(const T* row, long d, long) {
    float x = load_one(row + d);
    return load_raw<int32_t>(&x);
  }
};
#if defined(__AVX512BF16__)
struct DotScores {
  typedef Dots W;
  static long depth(long head_size) { return ceil_div(head_size, 2); }
  INLINE vi read(const Bf16* row, long d) { return load_raw<vi>(row + 2 * d); }
  INLINE int32_t read_one(const Bf16* row, long d, long head_size) {
    return row[2 * d].bits | (2 * d + 1 < head_size ? uint32_t(row[2 * d + 1].bits) << 16 : 0u);
  }
};
#endif

template <class T, class S>
static void copy_query(const T* from, int32_t* to, long head_size) {
  const long depth = S::depth(head_size);
  for (long d = 0; d < depth; ++d) to[d] = S::read_one(from, d, head_size);
}

// 16 rows of keys (those from `count` on are zero) to one panel [depth][16].
template <class T, class S>
static void pack_keys(const T* const* rows, long count, char* panel, long head_size) {
  const long depth = S::depth(head_size), whole = head_size / (S::W::kDepth * VW) * VW;
  int32_t* out = reinterpret_cast<int32_t*>(panel);
  for (long lane = 0; lane < 16; lane += VW) {
    for (long d = 0; d < whole; d += VW) {
      vi block[VW];
      UNROLL for (int i = 0; i < VW; ++i)
        block[i] = lane + i < count ? S::read(rows[lane + i], d) : vi{};
      transpose(block);
      UNROLL for (int i = 0; i < VW; ++i)
        store_raw(out + (d + i) * 16 + lane, block[i]);
    }
    for (long d = whole; d < depth; ++d)
      for (long i = lane; i < lane + VW; ++i) out[d * 16 + i] = i < count ? S::read_one(rows[i], d, head_size) : 0;
  }
}

template <class T>
static void widen_value(const T* from, float* to, long head_size, long padded) {
  long d = 0;
  for (; d + VW <= head_size; d += VW) store(to + d, load(from + d));
  if (d < head_size) {
    store(to + d, load_some(from + d, head_size - d));
    d += VW;
  }
  for (; d < padded; ++d) to[d] = 0;
}

// Loads the keys and values of positions [begin, begin + count) of one KV head of a sequence. Blocks are scattered over
// memory, so the hardware prefetcher stops at the end of each: rows of the next one (if it begins before `limit`) are
// requested while this one is converted.
template <class T, class S>
static void load_tile(const AttentionCall& call, const Geometry& g, long sequence, long kv_head, long begin, long count,
                      long limit, const Buffers& b) {
  const int32_t* table = call.block_tables + sequence * call.table_stride;
  const char* base = static_cast<const char*>(call.cache) + kv_head * call.block_size * g.row_bytes;
  const T* rows[16];
  long block = begin / call.block_size, offset = begin % call.block_size;
  for (long i = 0; i < count; ++block, offset = 0) {
    const char* at = base + table[block] * g.block_bytes + offset * g.row_bytes;
    const char* next = (block + 1) * call.block_size < limit ? base + table[block + 1] * g.block_bytes : nullptr;
    const long end = min(count, i + call.block_size - offset);
    for (; i < end; ++i, at += g.row_bytes) {
      rows[i % 16] = reinterpret_cast<const T*>(at);
      widen_value(reinterpret_cast<const T*>(at + g.half_bytes), b.values + i * g.padded, g.head_size, g.padded);
      for (long line = 0; next && line < g.row_bytes; line += 64) {
        __builtin_prefetch(next + line);
        __builtin_prefetch(next + g.half_bytes + line);
      }
      if (next) next += g.row_bytes;
      if (i % 16 == 15 || i == count - 1)
        pack_keys<T, S>(rows, i % 16 + 1, b.keys + i / 16 * S::depth(g.head_size) * 64, g.head_size);
    }
  }
}

}  // namespace ISA_NS
}  // namespace vllm_ms
