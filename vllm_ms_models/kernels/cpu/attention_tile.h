// Attention's tiles: one thread's buffers, and where the keys and values of a tile are multiplied: in the cache itself,
// or in a copy. attention.cpp explains the whole, kv_cache.cpp the layout of the cache.
#pragma once

#include "attention_latent.h"
#include "attention_softmax.h"
#include "kv_cache.h"
#include "tile_integers.h"

namespace vllm_ms {
namespace ISA_NS {

constexpr long kKeys = 256;       // positions of a tile
constexpr long kDirectRows = 24;  // up to here keys and values are multiplied where they are
constexpr long kMaxRuns = kKeys / kGroup;

// Which micro-kernel multiplies keys and values in the cache, and which a copy of them, for a query of T and a cache of
// S. Both take the same activations.
template <class T, class S>
struct Forms {
  typedef Float Direct, Copied;
};
template <>
struct Forms<F16, F16> {
  typedef Half Direct;
  typedef Float Copied;
};
template <>
struct Forms<Bf16, Bf16> {
#if defined(__AVX512BF16__)
  typedef Dots Direct, Copied;
#else
  typedef Pairs Direct;
  typedef Float Copied;
#endif
};
template <class T>
struct Forms<T, int8_t> {
  typedef Bytes Direct;
  typedef Float Copied;
};
#if defined(__AVX512BF16__)
template <>
struct Forms<Bf16, int8_t> {
  typedef ByteDots Direct;
  typedef Dots Copied;
};
#endif

struct Geometry {
  CacheLayout layout;
  long group, padded;  // query heads of a KV head; value_size up to a multiple of 16
  long tokens;         // of an item, at most
  bool direct;         // the panels of the cache need no padding
  long latent;         // value_size of a cache of latents, or 0
};

// One thread's buffers for an item.
struct Buffers {
  char* query;    // [rows][steps] float32, or pairs of bf16
  char* keys;     // copied: [kKeys / 16][steps][16]
  char* values;   // copied: [kKeys / pair][padded]
  float* scores;  // [kRows][kKeys]; probabilities take their place
  float* out;     // [rows][padded]
  RowStates* states;  // a block of rows each
  char *key_scales, *value_scales;  // copied: [kKeys] float32
};

static bool take_buffers(const Geometry& g, long rows, Buffers& b) {
  const long depth = (g.layout.head_size + 1) / 2 * 2 * 4;  // bytes of a row; pairs need half of it
  const long blocks = ceil_div(rows, tile_rows(rows));
  const long sizes[] = {rows * depth,         kKeys * depth,        kKeys * g.padded * 4,
                        kRows * kKeys * 4,    rows * g.padded * 4,  blocks * long(sizeof(RowStates)),
                        kKeys * kScaleBytes,  kKeys * kScaleBytes};
  long total = 0, offset[8];
  for (int i = 0; i < 8; ++i) {
    offset[i] = total;
    total += ceil_div(sizes[i], 64) * 64;
  }
  char* base = static_cast<char*>(scratch(Slot::kAttention, size_t(total)));
  if (!base) return false;
  b = {base + offset[0],
       base + offset[1],
       base + offset[2],
       reinterpret_cast<float*>(base + offset[3]),
       reinterpret_cast<float*>(base + offset[4]),
       reinterpret_cast<RowStates*>(base + offset[5]),
       base + offset[6],
       base + offset[7]};
  return true;
}

// A row of the query as `count` activations; what lies beyond the head is zero.
template <class T>
static void copy_query(const T* from, float* to, long head_size, long count) {
  for (long d = 0; d < count; ++d) to[d] = d < head_size ? load_one(from + d) : 0.0f;
}
static void copy_query(const Bf16* from, uint32_t* to, long head_size, long count) {
  if (head_size % 2) to[count - 1] = 0;
  memcpy(to, from, size_t(head_size) * 2);
}

// --- copies: the first `count` of a group's 16 positions, the others (which may hold anything) as zeros --------------

INLINE vi first_lanes(long lane, long count) { return kLanes + int(lane) < int(count); }

// Pairs of bf16, n of them; the others are zero.
INLINE vu load_pairs(const Bf16* from, long n) {
  if (n >= VW) return load_raw<vu>(from);
  uint32_t lanes[VW] = {};
  memcpy(lanes, from, size_t(n) * 4);
  return load_raw<vu>(lanes);
}
INLINE void store_wide(float* to, vu bits) { store(to, (vf)bits); }

template <class T>
static void copy_keys(const T* keys, float* to, long head_size, long count) {
  for (long lane = 0; lane < kGroup; lane += VW)
    for (long i = lane; i < head_size * kGroup; i += kGroup)
      store_wide(to + i, (vu)load(keys + i) & (vu)first_lanes(lane, count));
}
static void copy_keys(const Bf16* keys, float* to, long head_size, long count) {
  for (long lane = 0; lane < kGroup; lane += VW) {
    const vu kept = (vu)first_lanes(lane, count);
    long d = 0;
    for (; d + 1 < head_size; d += 2) {
      const vu pair = load_raw<vu>(keys + d * kGroup + 2 * lane) & kept;
      store_wide(to + d * kGroup + lane, pair << 16);
      store_wide(to + (d + 1) * kGroup + lane, pair & 0xffff0000u);
    }
    if (d < head_size) store_wide(to + d * kGroup + lane, (vu)load(keys + d * kGroup + lane) & kept);
  }
}
static void copy_keys(const Bf16* keys, uint32_t* to, long head_size, long count) {
  for (long lane = 0; lane < kGroup; lane += VW) {
    const vu kept = (vu)first_lanes(lane, count);
    long d = 0;
    for (; d + 1 < head_size; d += 2, to += kGroup)
      store_raw(to + lane, load_raw<vu>(keys + d * kGroup + 2 * lane) & kept);
    if (d < head_size) store_raw(to + lane, ((vu)load(keys + d * kGroup + lane) & kept) >> 16);
    to -= d / 2 * kGroup;
  }
}

template <class T>
static void copy_values(const T* values, float* to, long head_size, long padded, long count) {
  for (long i = 0; i < kGroup; ++i, values += head_size, to += padded)
    for (long d = 0; d < padded; d += VW) {
      const long n = i < count ? max(0, head_size - d) : 0;
      store(to + d, n >= VW ? load(values + d) : load_some(values + d, n));
    }
}
static void copy_values(const Bf16* values, float* to, long head_size, long padded, long count) {
  for (long i = 0; i < kGroup; i += 2, values += 2 * head_size, to += 2 * padded)
    for (long d = 0; d < padded; d += VW) {
      const vu pairs = load_pairs(values + 2 * d, max(0, head_size - d));
      store_wide(to + d, i < count ? pairs << 16 : vu{});
      store_wide(to + padded + d, i + 1 < count ? pairs & 0xffff0000u : vu{});
    }
}
static void copy_values(const Bf16* values, uint32_t* to, long head_size, long padded, long count) {
  for (long i = 0; i < kGroup; i += 2, values += 2 * head_size, to += padded) {
    const uint32_t kept = i + 1 < count ? 0xffffffffu : i < count ? 0xffffu : 0;
    for (long d = 0; d < padded; d += VW) store_raw(to + d, load_pairs(values + 2 * d, max(0, head_size - d)) & kept);
  }
}

// Integers of a group, always all of them: there is no NaN among them.
static void copy_integer_keys(const int8_t* keys, float* to, long head_size) {
  for (long i = 0; i < head_size * kGroup; i += VW) store(to + i, from_int8(load_raw<vb>(keys + i)));
}
static void copy_integer_values(const int8_t* from, float* to, long padded, long width) {
  for (long i = 0; i < kGroup; ++i, from += width, to += padded) {
    int8_t row[16] = {};
    memcpy(row, from, size_t(width));
    for (long d = 0; d < 16; d += VW) store(to + d, from_int8(load_raw<vb>(row + d)));
  }
}
#if defined(__AVX512BF16__)
INLINE vu widen_pair(const int8_t* even, const int8_t* odd, long width) {
  int8_t rows[32] = {};
  memcpy(rows, even, size_t(width));
  if (odd) memcpy(rows + 16, odd, size_t(width));
  return ByteDots::widen(load_raw<ByteDots::Raw>(rows), 0);
}
static void copy_integer_keys(const int8_t* keys, uint32_t* to, long head_size) {
  long d = 0;
  for (; d + 1 < head_size; d += 2, keys += 2 * kGroup, to += kGroup)
    store_raw(to, ByteDots::widen(load_raw<ByteDots::Raw>(keys), 0));
  if (d < head_size) store_raw(to, widen_pair(keys, nullptr, kGroup));
}
static void copy_integer_values(const int8_t* from, uint32_t* to, long padded, long width) {
  for (long i = 0; i < kGroup; i += 2, from += 2 * width, to += padded)
    store_raw(to, width == 16 ? ByteDots::widen(load_raw<ByteDots::Raw>(from), 0)
                              : widen_pair(from, from + width, width));
}
#endif

// --- a tile --------------------------------------------------------------------------------------------------------

// Where one head of one sequence lies.
struct Source {
  const int32_t* table;
  const char* base;
  long length;
};

// The group of keys that holds `position`.
INLINE const char* find_group(const CacheLayout& layout, const Source& source, long position) {
  const uint32_t size = uint32_t(layout.block_size), at = uint32_t(position);
  return source.base + source.table[at / size] * layout.block + at % size / uint32_t(kGroup) * layout.group;
}

// The head of int8 that holds `position`.
INLINE Piece find_piece(const CacheLayout& layout, const Source& source, long position) {
  const uint32_t size = uint32_t(layout.block_size), at = uint32_t(position);
  return {layout, const_cast<char*>(source.base) + source.table[at / size] * layout.block,
          long(at % size) / kGroup * kGroup};
}

// The group of values that holds `position`.
template <class S>
INLINE const char* find_values(const CacheLayout& layout, const Source& source, long position) {
  if constexpr (kIntegers<S>) return find_piece(layout, source, position).values(0);
  else return find_group(layout, source, position) + layout.half;
}

// Groups of positions that follow each other in memory.
struct Run {
  const char *keys, *values;
  long groups;
  bool direct;  // in the cache
  const char *key_scales, *value_scales;  // of int8
};

template <class T, class S>
static void copy_integers(const Geometry& g, const Piece& piece, long index, const Buffers& b, char* keys,
                          char* values) {
  typedef typename Forms<T, S>::Copied::X X;
  const long head_size = g.layout.head_size;
  copy_integer_keys(reinterpret_cast<const int8_t*>(piece.keys()), reinterpret_cast<X*>(keys), head_size);
  for (long p = 0; p * 16 < head_size; ++p)
    copy_integer_values(reinterpret_cast<const int8_t*>(piece.values(p)), reinterpret_cast<X*>(values) + p * 16,
                        g.padded, min(16, head_size - p * 16));
  memcpy(b.key_scales + index * kGroup * kScaleBytes, piece.key_scales(), size_t(kGroup * kScaleBytes));
  memcpy(b.value_scales + index * kGroup * kScaleBytes, piece.value_scales(), size_t(kGroup * kScaleBytes));
}

template <class T>
static void copy_group(const Geometry& g, const char* from, long count, char* keys, char* values) {
  typedef typename Forms<T, T>::Copied W;
  typedef typename W::X X;
  const CacheLayout& layout = g.layout;
  const T *k = reinterpret_cast<const T*>(from), *v = reinterpret_cast<const T*>(from + layout.half);
  if (g.latent) {
    copy_latent_keys(k, reinterpret_cast<X*>(keys), layout.head_size, count);
    copy_latent_values(k, reinterpret_cast<X*>(values), layout.head_size, g.latent, g.padded, count);
    return;
  }
  if (W::kDepth == 2 && g.direct && g.padded == layout.head_size && count == kGroup) {
    memcpy(keys, k, size_t(layout.group));
    memcpy(values, v, size_t(layout.group));
    return;
  }
  copy_keys(k, reinterpret_cast<X*>(keys), layout.head_size, count);
  copy_values(v, reinterpret_cast<X*>(values), layout.head_size, g.padded, count);
}

INLINE void request(const char* from, long bytes) {
  for (long line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

// Requests a group of values.
template <class S>
INLINE void request_values(const CacheLayout& layout, const Source& source, long position) {
  if constexpr (kIntegers<S>) {
    const Piece piece = find_piece(layout, source, position);
    for (long p = 0; p * 16 < layout.head_size; ++p) request(piece.values(p), kGroup * 16);
  } else {
    request(find_values<S>(layout, source, position), layout.group);
  }
}

// Groups of positions [at, end) that lie in one block of the cache.
template <class S>
static Run direct_run(const CacheLayout& layout, const Source& source, long at, long end) {
  const long room = layout.block_size - at % layout.block_size;
  long groups = min(room / kGroup, ceil_div(end - at, kGroup));
  if constexpr (kIntegers<S>) {
    const Piece piece = find_piece(layout, source, at);
    return {piece.keys(), piece.values(0), groups, true, piece.key_scales(), piece.value_scales()};
  } else {
    const char* from = find_group(layout, source, at);
    groups = min(groups, (source.length - at) / kGroup);
    return {from, from + layout.half, groups, true, nullptr, nullptr};
  }
}

// Fills `runs` with the groups from `begin` (a multiple of 16) to `end`; returns how many there are. The group in which
// the sequence ends is copied, because what follows may be NaN, unless integers; so is everything if not `direct`.
template <class T, class S>
static long find_runs(const Geometry& g, const Source& source, long begin, long end, bool direct, const Buffers& b,
                      Run* runs) {
  typedef typename Forms<T, S>::Copied W;
  const CacheLayout& layout = g.layout;
  const long key_bytes = ceil_div(layout.head_size, W::kDepth) * 64, value_bytes = kGroup / W::kDepth * g.padded * 4;
  long count = 0;
  for (long at = begin; at < end;) {
    const long index = (at - begin) / kGroup;
    Run* last = count ? runs + count - 1 : nullptr;
    if (direct && (kIntegers<S> || at + kGroup <= source.length)) {
      runs[count] = direct_run<S>(layout, source, at, end);
      at += runs[count++].groups * kGroup;
      continue;
    }
    if (at + 4 * kGroup < end) {  // in another block, which the hardware's prefetcher does not foresee
      request(find_group(layout, source, at + 4 * kGroup), layout.group);
      request_values<S>(layout, source, at + 4 * kGroup);
    }
    char *keys = b.keys + index * key_bytes, *values = b.values + index * value_bytes;
    if constexpr (kIntegers<S>) copy_integers<T, S>(g, find_piece(layout, source, at), index, b, keys, values);
    else copy_group<T>(g, find_group(layout, source, at), min(kGroup, source.length - at), keys, values);
    if (last && !last->direct) ++last->groups;
    else runs[count++] = {keys, values, 1, false, b.key_scales + index * kGroup * kScaleBytes,
                          b.value_scales + index * kGroup * kScaleBytes};
    at += kGroup;
  }
  return count;
}

}  // namespace ISA_NS
}  // namespace vllm_ms
