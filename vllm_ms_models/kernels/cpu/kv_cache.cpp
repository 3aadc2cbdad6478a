// Writing keys and values into the paged cache, in the layout in which attention multiplies them.
//
// Layout. One layer's cache is [num_blocks][keys, values][kv_heads] pieces of block_size * head_size elements, and
// block_size is a multiple of 16. What a piece holds depends on the storage type, not on the instruction set:
//
//                          keys                                          values
//     float32, float16     [block_size / 16][head_size][16]              [block_size][head_size]
//     bfloat16             [block_size / 16] of [head_size / 2][16][2]   [block_size / 2][head_size][2]
//                          and, if head_size is odd, [16]
//     int8                 [block_size / 16][head_size][16]              [ceil(head_size / 16)][block_size][16 or less]
//                          and [block_size] float32 scales               and [block_size] float32 scales
//
// Keys are panels of 16 positions, one step along the head's features being contiguous: the layout of a linear layer's
// weight, so scores are the micro-kernel of tile.h on the cache itself. Values are already panels of features along the
// positions, because rows of the same head follow each other; bfloat16 ones are interleaved in pairs of positions, what
// vdpbf16ps multiplies. A position is written once and read by every later step, so the shuffling is here.
//
// A bfloat16 key of an odd head size has no partner for its last feature: the 16 of a panel follow the pairs, in the
// same number of bytes. Attention pads such panels on its way (attention_tile.h).
//
// Numbers of int8. A key or a value is the integers of one token and head times their scale (`Kernels.write_kv` in
// interface.py): 68 bytes instead of 128 for a head of 64 in bf16. Any two steps of a panel, features of keys or positions
// of values, are 32 bytes in a row, which become pairs of bf16, exactly (ByteDots in tile_integers.h); therefore values
// are in panels of features, each through the whole block, so that a block is multiplied in one piece. Scales are
// multiplied into scores and probabilities, 16 positions at a time, and so lie by themselves, in their block.
//
// Speed. Of a whole panel of new positions (consecutive slots from a multiple of 16, i.e. prefill) keys are transposed
// VW x VW in registers and pairs of values interleaved, a few cycles for 64 bytes, so that memory is the limit. Other
// tokens, such as one each of many sequences, are scattered value by value: about 100 stores to 36 cache lines for a
// head of 64 in bf16, most of them in memory; those of the next token are requested meanwhile. Tokens are spread over
// the threads. Two threads may write to the same cache line but never to the same element, and no store
// is wider than what its thread owns.

#include "kv_cache.h"

#include "rounding.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

// One position, which is number `lane` of its group, to the group's keys.
template <class T>
static void write_key(const T* key, T* group, long lane, long head_size) {
  for (long d = 0; d < head_size; ++d) group[d * kGroup + lane] = key[d];
}
static void write_key(const Bf16* key, Bf16* group, long lane, long head_size) {
  for (long d = 0; d + 1 < head_size; d += 2) memcpy(group + d * kGroup + lane * 2, key + d, 4);
  if (head_size % 2) group[(head_size - 1) * kGroup + lane] = key[head_size - 1];
}

template <class T>
static void write_value(const T* value, T* group, long lane, long head_size) {
  memcpy(group + lane * head_size, value, size_t(head_size) * sizeof(T));
}
static void write_value(const Bf16* value, Bf16* group, long lane, long head_size) {
  Bf16* to = group + lane / 2 * 2 * head_size + lane % 2;
  for (long d = 0; d < head_size; ++d) to[2 * d] = value[d];
}

// VW features of VW positions, transposed: 32 bits of each feature, or of each pair of features.
INLINE void store_keys(float* to, const vi* rows) {
  UNROLL for (int i = 0; i < VW; ++i)
    store_raw(to + i * kGroup, rows[i]);
}
INLINE void store_keys(Bf16* to, const vi* rows) {
  UNROLL for (int i = 0; i < VW; ++i)
    store_raw(to + i * 2 * kGroup, rows[i]);
}
INLINE void store_keys(F16* to, const vi* rows) {
  UNROLL for (int i = 0; i < VW; ++i) {
    store_raw(to + 2 * i * kGroup, __builtin_convertvector((vu)rows[i] & 0xffff, vh));
    store_raw(to + (2 * i + 1) * kGroup, __builtin_convertvector((vu)rows[i] >> 16, vh));
  }
}
INLINE void store_keys(int8_t* to, const vi* rows) {
  UNROLL for (int i = 0; i < 4 * VW; ++i)
    store_raw(to + i * kGroup, to_int8((vi)((vu)rows[i / 4] >> (i % 4 * 8))));
}
template <class T>
INLINE T* lane_of(T* group, long lane) {
  return group + lane;
}
INLINE Bf16* lane_of(Bf16* group, long lane) { return group + 2 * lane; }

// A whole group from kGroup rows that are `stride` apart.
template <class T>
static void write_keys(const T* keys, long stride, T* group, long head_size) {
  constexpr long kStep = VW * 4 / long(sizeof(T));
  long d = 0;
  for (; d + kStep <= head_size; d += kStep)
    for (long lane = 0; lane < kGroup; lane += VW) {
      vi rows[VW];
      UNROLL for (int i = 0; i < VW; ++i)
        rows[i] = load_raw<vi>(keys + (lane + i) * stride + d);
      transpose(rows);
      store_keys(lane_of(group, lane) + d * kGroup, rows);
    }
  if (d == head_size) return;
  for (long lane = 0; lane < kGroup; ++lane)
    write_key(keys + lane * stride + d, group + d * kGroup, lane, head_size - d);  // d is even
}

template <class T>
static void write_values(const T* values, long stride, T* group, long head_size) {
  for (long lane = 0; lane < kGroup; ++lane) write_value(values + lane * stride, group, lane, head_size);
}
static void write_values(const Bf16* values, long stride, Bf16* group, long head_size) {
  for (long lane = 0; lane < kGroup; lane += 2, group += 2 * head_size) {
    const Bf16 *even = values + lane * stride, *odd = even + stride;
    long d = 0;
    for (; d + VW <= head_size; d += VW) {
      const vu low = __builtin_convertvector(load_raw<vh>(even + d), vu);
      const vu high = __builtin_convertvector(load_raw<vh>(odd + d), vu);
      store_raw(group + 2 * d, low | (high << 16));
    }
    for (; d < head_size; ++d) group[2 * d] = even[d], group[2 * d + 1] = odd[d];
  }
}

// `count` rows of one head, `stride` apart, to int8; integers go to `to`, `room` bytes each, and scales to `scales`.
template <class T>
static void round_rows(const T* x, long stride, long count, long head_size, int8_t* to, long room, char* scales) {
  for (long i = 0; i < count; ++i, x += stride, to += room) {
    const uint32_t bits = largest_bits(x, head_size);
    RowScale by = {0.0f, __builtin_nanf("")};
    if (bits < kInfinityBits) by = row_scale(bits);
    memcpy(scales + i * kScaleBytes, &by.scale, sizeof(by.scale));
    if (bits >= kInfinityBits) memset(to, 0, size_t(head_size));
    else
      for (long d = 0; d < head_size; d += VW)
        store_raw(to + d, to_int8(to_integers(load_padded(x, d, head_size) * by.factor)));
  }
}

// Keys and values of one head, of one token or (`whole`) of a group of them, to a cache of int8. `rows` has room for
// kGroup rounded rows.
template <class T>
static void write_rounded(const T* key, const T* value, long stride, bool whole, const Piece& piece, long lane,
                          int8_t* rows, long room) {
  const long size = piece.layout.head_size, count = whole ? kGroup : 1;
  int8_t* keys = reinterpret_cast<int8_t*>(piece.keys());
  round_rows(key, stride, count, size, rows, room, piece.key_scales() + lane * kScaleBytes);
  if (whole) write_keys(rows, room, keys, size);
  else write_key(rows, keys, lane, size);
  round_rows(value, stride, count, size, rows, room, piece.value_scales() + lane * kScaleBytes);
  for (long p = 0; p * 16 < size; ++p) {
    const long width = min(16, size - p * 16);
    char* to = piece.values(p) + lane * width;
    for (long i = 0; i < count; ++i)
      if (width == 16) memcpy(to + i * 16, rows + i * room + p * 16, 16);
      else memcpy(to + i * width, rows + i * room + p * 16, size_t(width));
  }
}

// Requests the cache lines of a group that one of its positions, at `slot`, touches.
template <class S>
static void request_position(const CacheLayout& layout, const char* group, long slot) {
  const long lane = slot % kGroup;
  if constexpr (kIntegers<S>) {
    const long offset = slot % layout.block_size / kGroup * kGroup;
    const Piece piece = {layout, const_cast<char*>(group) - offset * layout.head_size, offset};
    for (long at = 0; at < layout.group; at += 64) __builtin_prefetch(group + at, 1);
    for (long p = 0; p * 16 < layout.head_size; ++p) __builtin_prefetch(piece.values(p) + lane * 16, 1);
    __builtin_prefetch(piece.key_scales() + lane * kScaleBytes, 1);
    __builtin_prefetch(piece.value_scales() + lane * kScaleBytes, 1);
    return;
  }
  const long width = sizeof(S);
  for (long at = lane * width; at < layout.group; at += 64) __builtin_prefetch(group + at, 1);
  const long row = layout.head_size * width * 2;  // values: a pair of positions
  const char* values = group + layout.half + lane / 2 * row;
  for (long at = 0; at < row; at += 64) __builtin_prefetch(values + at, 1);
}

// Whether the tokens from `token` on, of which there are `left`, fill a group.
INLINE bool fills_group(const int64_t* slots, long token, long left) {
  const int64_t slot = slots[token];
  if (left < kGroup || slot % kGroup) return false;
  for (long i = 1; i < kGroup; ++i)
    if (slots[token + i] != slot + i) return false;
  return true;
}

// False: out of memory.
template <class T, class S>
static bool write_tokens(const WriteCall& call, long begin, long end) {
  const CacheLayout layout = layout_of<S>(call.block_size, call.head_size, call.kv_heads);
  const long size = call.head_size, stride = call.kv_heads * size, room = ceil_div(size, 64) * 64;
  int8_t* rows = nullptr;  // of a group, rounded
  if (kIntegers<S> && !(rows = static_cast<int8_t*>(scratch(Slot::kActivations, size_t(kGroup * room))))) return false;
  for (long token = begin, count; token < end; token += count) {
    count = 1;
    const long slot = call.slots[token];
    if (slot < 0) continue;
    const bool whole = fills_group(call.slots, token, end - token);
    if (whole) count = kGroup;
    const long offset = slot % call.block_size;
    auto group_of = [&](long position) {
      return static_cast<char*>(call.cache) + position / call.block_size * layout.block +
             position % call.block_size / kGroup * layout.group;
    };
    char* at = group_of(slot);
    if (!whole && token + 1 < end && call.slots[token + 1] >= 0)
      for (long h = 0, next = call.slots[token + 1]; h < call.kv_heads; ++h)
        request_position<S>(layout, group_of(next) + h * layout.head, next);
    const T* key = static_cast<const T*>(call.key) + token * stride;
    const T* value = static_cast<const T*>(call.value) + token * stride;
    for (long h = 0; h < call.kv_heads; ++h, at += layout.head, key += size, value += size) {
      if constexpr (kIntegers<S>) {
        const long first = offset / kGroup * kGroup;
        write_rounded(key, value, stride, whole, Piece{layout, at - first * size, first}, offset % kGroup, rows, room);
        continue;
      }
      T *keys = reinterpret_cast<T*>(at), *values = reinterpret_cast<T*>(at + layout.half);
      if (whole) {
        write_keys(key, stride, keys, size);
        write_values(value, stride, values, size);
      } else {
        write_key(key, keys, offset % kGroup, size);
        write_value(value, values, offset % kGroup, size);
      }
    }
  }
  return true;
}

template <class T>
static bool write_tokens(const WriteCall& call, long begin, long end) {
  return call.int8_cache ? write_tokens<T, int8_t>(call, begin, end) : write_tokens<T, T>(call, begin, end);
}

}  // namespace

const char* write_kv(const WriteCall& call) {
  const long slots = call.num_blocks * call.block_size;
  if (call.block_size % kGroup)
    return fail("write_kv: blocks of %ld positions; a multiple of %ld is expected.", call.block_size, kGroup);
  for (long token = 0; token < call.tokens; ++token)
    if (call.slots[token] >= slots)
      return fail("write_kv: slot %ld of token %ld is outside of the cache's %ld slots.", long(call.slots[token]),
                  token, slots);
  const long bytes = call.kv_heads * call.head_size * dtype_size(call.dtype) * 4;
  // Ranges of whole groups of tokens: the slots of a prefill that starts with a block then come in whole groups, too.
  bool failed = false;
  parallel_ranges(ceil_div(call.tokens, kGroup), bytes * kGroup, [&](long begin, long end) {
    begin *= kGroup, end = min(end * kGroup, call.tokens);
    const bool done = call.dtype == kFloat32    ? write_tokens<float>(call, begin, end)
                      : call.dtype == kBfloat16 ? write_tokens<Bf16>(call, begin, end)
                                                : write_tokens<F16>(call, begin, end);
    if (!done) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
  });
  return failed ? fail("write_kv: out of memory for rounded rows.") : nullptr;
}

}  // namespace ISA_NS
}  // namespace vllm_ms
