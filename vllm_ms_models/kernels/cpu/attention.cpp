// Attention over the paged KV cache with an online softmax, for any mix of prefill and decode.
//
// Layout. One layer's cache is [num_blocks][2][kv_heads][block_size][head_size]: the keys of one head in one block are
// contiguous, then its values come kv_heads * block_size * head_size later.
//
// Tiles. A work item is one KV head of one sequence, up to kTileRows rows and a range of key positions. Its rows are
// all query heads that share the KV head (the GQA group) times as many consecutive tokens as fit, so that a key
// converted once serves them all. For kKeys positions at a time it
//
//   1. packs the keys into panels of 16 positions, [panel][head_size][16], by transposing 16 x 16 blocks in registers:
//   the
//      layout of a linear layer's weight, so that scores = q * k^T is the micro-kernel of tile.h (bf16: pairs and
//      vdpbf16ps, exact products; otherwise float32),
//   2. applies scale, soft cap and mask, and updates each row's maximum m and sum l; probabilities stay in float32,
//   3. widens the values to float32 rows, which *are* panels of 16 features along the positions, and adds p * v to the
//      float32 accumulator with the same micro-kernel, after multiplying it by exp(m_old - m_new) where m changed.
//
// Memory: one set of buffers per thread (rows * kKeys scores + kKeys * head_size keys and values: 100 KB for head size
// 64, in L2), whatever the context. Packing costs ~4 cycles per 16 values of K and V, the products 1 to 2 per row: with
// 64 rows about 4%, with the 7 rows of a decode step of Qwen2.5-0.5B it still runs ahead of memory.
//
// Positions outside of [first visible, last visible] of the item's rows are never touched, nor are their table entries:
// a sliding window costs what it covers. Partial tiles are masked by comparing positions.
//
// Work split. Items are claimed dynamically, the longest (last) prefill tiles of a sequence first. If an item exceeds
// 1/(3 * threads) of the whole call and has more than 2 * kSplitKeys positions, its positions are cut: each piece
// writes its unnormalised sum, m and l to a float32 buffer and a second pass merges them. One long sequence keeps all
// cores busy.

#include "kernels.h"
#include "tile.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

constexpr long kTileRows = 64, kKeys = 128, kSplitKeys = 256;
constexpr float kNegative = -__builtin_inff();

struct Item {
  long sequence, kv_head, first_token, tokens;  // tokens: within the sequence's query rows
  long begin, end;                              // key positions
  long piece, pieces;
  float* partial;  // pieces > 1: [rows][padded + 2] of this piece
};

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

#if VW == 16
constexpr vi kLanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif VW == 8
constexpr vi kLanes = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr vi kLanes = {0, 1, 2, 3};
#endif

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
      UNROLL for (int i = 0; i < VW; ++i) block[i] = lane + i < count ? S::read(rows[lane + i], d) : vi{};
      transpose(block);
      UNROLL for (int i = 0; i < VW; ++i) store_raw(out + (d + i) * 16 + lane, block[i]);
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

// Loads the keys and values of positions [begin, begin + count).
template <class T, class S>
static void load_tile(const AttentionCall& call, const Geometry& g, const Item& item, long begin, long count,
                      const Buffers& b) {
  const int32_t* table = call.block_tables + item.sequence * call.table_stride;
  const char* base = static_cast<const char*>(call.cache) + item.kv_head * call.block_size * g.row_bytes;
  const T* rows[16];
  long block = begin / call.block_size, offset = begin % call.block_size;
  const char* at = base + table[block] * g.block_bytes;
  for (long i = 0; i < count; ++i, ++offset) {
    if (offset == call.block_size) {
      offset = 0;
      at = base + table[++block] * g.block_bytes;
    }
    rows[i % 16] = reinterpret_cast<const T*>(at + offset * g.row_bytes);
    widen_value(reinterpret_cast<const T*>(at + g.half_bytes + offset * g.row_bytes), b.values + i * g.padded,
                g.head_size, g.padded);
    if (i % 16 == 15 || i == count - 1)
      pack_keys<T, S>(rows, i % 16 + 1, b.keys + i / 16 * S::depth(g.head_size) * 64, g.head_size);
  }
}

// Turns one row of scores, visible in [low, high), into probabilities relative to the running maximum.
// Returns the factor by which everything summed so far has to be multiplied.
static float soften(float* scores, long low, long high, long width, float scale, float cap, float& m, float& l) {
  vf top = splat(kNegative);
  for (long i = 0; i < width; i += VW) {
    vf s = load(scores + i) * scale;
    if (cap > 0) s = cap * hyperbolic_tangent(s / cap);
    vi at = kLanes + int(i);
    s = select((at >= int(low)) & (at < int(high)), s, splat(kNegative));
    top = vmax(s, top);
    store(scores + i, s);
  }
  float best = largest(top);
  if (!(best > kNegative)) {  // nothing visible (a NaN would have lost the comparisons: let it through below)
    bool blank = low >= high;
    if (blank) {
      for (long i = 0; i < width; ++i) scores[i] = 0;
      return 1.0f;
    }
  }
  float next = best > m ? best : m;
  if (next == kNegative) next = 0;
  vf total = {};
  for (long i = 0; i < width; i += VW) {
    vf s = load(scores + i);
    vf p = select(s == splat(kNegative), vf{}, exponential(s - next));
    total += p;
    store(scores + i, p);
  }
  float factor = m == next ? 1.0f : exponential(splat(m - next))[0];
  l = l * factor + sum(total);
  m = next;
  return factor;
}

template <class T, class S>
static const char* run_item(const AttentionCall& call, const Geometry& g, const Item& item) {
  const long rows = item.tokens * g.group, depth = S::depth(g.head_size);
  Buffers b;
  if (!take_buffers(g, rows, b)) return fail("Out of memory for the attention of %ld rows.", rows);
  const long first_row = call.query_start[item.sequence] + item.first_token;
  const long length = call.seq_lens[item.sequence];
  const long first_position =
      length - (call.query_start[item.sequence + 1] - call.query_start[item.sequence]) + item.first_token;
  const long head = item.kv_head * g.group;
  for (long r = 0; r < rows; ++r)
    copy_query<T, S>(
        static_cast<const T*>(call.query) + ((first_row + r / g.group) * call.heads + head + r % g.group) * g.head_size,
        reinterpret_cast<int32_t*>(b.query) + r * depth, g.head_size);
  memset(b.out, 0, size_t(rows * g.padded) * 4);
  for (long r = 0; r < rows; ++r) b.m[r] = kNegative, b.l[r] = 0;

  for (long key = item.begin; key < item.end; key += kKeys) {
    const long count = min(kKeys, item.end - key), width = ceil_div(count, 16) * 16;
    load_tile<T, S>(call, g, item, key, count, b);
    multiply_block<typename S::W>(reinterpret_cast<const typename S::W::X*>(b.query), depth, b.keys, 64, depth * 64,
                                  depth, b.scores, kKeys, false, rows, width / 16);
    for (long r = 0; r < rows; ++r) {
      const long position = first_position + r / g.group;
      const long high = min(call.causal ? position + 1 : length, key + count) - key;
      const long low = max(call.window ? position - call.window + 1 : 0, key) - key;
      float factor =
          soften(b.scores + r * kKeys, low, high, width, float(call.scale), float(call.soft_cap), b.m[r], b.l[r]);
      if (factor == 1.0f) continue;
      for (long d = 0; d < g.padded; d += VW) store(b.out + r * g.padded + d, load(b.out + r * g.padded + d) * factor);
    }
    multiply_block<Float>(b.scores, kKeys, reinterpret_cast<const char*>(b.values), g.padded * 4, 64, count, b.out,
                          g.padded, true, rows, g.padded / 16);
  }

  for (long r = 0; r < rows; ++r) {
    const float* sums = b.out + r * g.padded;
    if (item.partial) {
      float* to = item.partial + r * (g.padded + 2);
      memcpy(to, sums, size_t(g.padded) * 4);
      to[g.padded] = b.m[r];
      to[g.padded + 1] = b.l[r];
      continue;
    }
    T* to = static_cast<T*>(call.out) + ((first_row + r / g.group) * call.heads + head + r % g.group) * g.head_size;
    const float scale = b.l[r] > 0 ? 1.0f / b.l[r] : b.l[r] == 0 ? 0.0f : b.l[r];
    long d = 0;
    for (; d + VW <= g.head_size; d += VW) store(to + d, load(sums + d) * scale);
    if (d < g.head_size) store_some(to + d, load(sums + d) * scale, g.head_size - d);
  }
  return nullptr;
}

// Merges the pieces of a split item; `item` is its first piece, the others' partial results follow it.
template <class T>
static void merge(const AttentionCall& call, const Geometry& g, const Item& item) {
  const long rows = item.tokens * g.group, stride = g.padded + 2;
  for (long r = 0; r < rows; ++r) {
    float top = kNegative, total = 0;
    for (long i = 0; i < item.pieces; ++i) {
      float m = item.partial[(i * rows + r) * stride + g.padded];
      top = m > top ? m : top;
    }
    if (top == kNegative) top = 0;
    float* sums = item.partial + r * stride;  // merged in place, into the first piece
    for (long i = 0; i < item.pieces; ++i) {
      const float* part = item.partial + (i * rows + r) * stride;
      float factor = exponential(splat(part[g.padded] - top))[0];
      if (part[g.padded] == kNegative) factor = 0;
      total += part[g.padded + 1] * factor;
      for (long d = 0; d < g.padded; d += VW) store(sums + d, load(part + d) * factor + (i ? load(sums + d) : vf{}));
    }
    const long token = call.query_start[item.sequence] + item.first_token + r / g.group;
    T* to = static_cast<T*>(call.out) + (token * call.heads + item.kv_head * g.group + r % g.group) * g.head_size;
    const float scale = total > 0 ? 1.0f / total : total == 0 ? 0.0f : total;
    long d = 0;
    for (; d + VW <= g.head_size; d += VW) store(to + d, load(sums + d) * scale);
    if (d < g.head_size) store_some(to + d, load(sums + d) * scale, g.head_size - d);
  }
}

// --- planning -------------------------------------------------------------------------------------------------------

struct Plan {
  Item* items;      // null while counting
  float* partials;  // set with `items`
  long count, cost;
  long target;  // cost above which an item is split; 0: never
  long partial_floats;
};

INLINE long pieces_of(const Plan& plan, long keys, long rows) {
  if (!plan.target) return 1;
  return max(1, min(ceil_div(keys * (rows + 8), plan.target), keys / kSplitKeys));
}

// Visits every item: counts them and sums their costs, and fills `plan.items` if it is set.
static void plan_items(const AttentionCall& call, const Geometry& g, Plan& plan) {
  const long tile = max(1, kTileRows / g.group);
  plan.count = plan.cost = plan.partial_floats = 0;
  for (long s = 0; s < call.sequences; ++s) {
    const long queries = call.query_start[s + 1] - call.query_start[s], length = call.seq_lens[s];
    for (long t = ceil_div(queries, tile) - 1; t >= 0; --t) {
      const long first = t * tile, tokens = min(tile, queries - first), rows = tokens * g.group;
      const long position = length - queries + first;
      const long begin = call.window ? max(0, position - call.window + 1) : 0;
      const long end = call.causal ? position + tokens : length, keys = end - begin;
      const long pieces = pieces_of(plan, keys, rows);
      for (long h = 0; h < call.kv_heads; ++h) {
        const long floats = pieces > 1 ? rows * (g.padded + 2) : 0;
        for (long i = 0; i < pieces && plan.items; ++i)
          plan.items[plan.count + i] = {s,
                                        h,
                                        first,
                                        tokens,
                                        begin + keys * i / pieces,
                                        begin + keys * (i + 1) / pieces,
                                        i,
                                        pieces,
                                        floats ? plan.partials + plan.partial_floats + i * floats : nullptr};
        plan.partial_floats += pieces * floats;
        plan.count += pieces;
        plan.cost += keys * (rows + 8);
      }
    }
  }
}

static const char* check(const AttentionCall& call) {
  for (long s = 0; s < call.sequences; ++s) {
    const long begin = call.query_start[s], end = call.query_start[s + 1], length = call.seq_lens[s];
    if (begin < 0 || end < begin || end > call.tokens || (end > begin && length < end - begin))
      return fail("paged_attention: sequence %ld has query rows %ld to %ld of %ld and length %ld.", s, begin, end,
                  call.tokens, length);
    if (end == begin) continue;
    const long first = call.window ? max(0, length - (end - begin) - call.window + 1) : 0;
    if (ceil_div(length, call.block_size) > call.table_stride)
      return fail("paged_attention: sequence %ld of length %ld needs more than the %ld blocks of its table.", s, length,
                  call.table_stride);
    for (long i = first / call.block_size; i < ceil_div(length, call.block_size); ++i) {
      const long block = call.block_tables[s * call.table_stride + i];
      if (block < 0 || block >= call.num_blocks)
        return fail("paged_attention: block %ld of sequence %ld is %ld, the cache has %ld blocks.", i, s, block,
                    call.num_blocks);
    }
  }
  return nullptr;
}

template <class T, class S>
static const char* run(const AttentionCall& call) {
  Geometry g;
  g.group = call.heads / call.kv_heads;
  g.head_size = call.head_size;
  g.padded = ceil_div(call.head_size, 16) * 16;
  g.row_bytes = call.head_size * long(sizeof(T));
  g.half_bytes = call.kv_heads * call.block_size * g.row_bytes;
  g.block_bytes = 2 * g.half_bytes;

  Plan plan = {};
  plan_items(call, g, plan);
  const long threads = thread_count();
  if (threads > 1) {
    plan.target = max(1, plan.cost / (3 * threads));
    plan_items(call, g, plan);
  }
  plan.partials = static_cast<float*>(scratch(Slot::kPartials, size_t(plan.partial_floats) * 4));
  plan.items = static_cast<Item*>(scratch(Slot::kItems, size_t(plan.count) * sizeof(Item)));
  if (!plan.items || !plan.partials) return fail("Out of memory for %ld attention items.", plan.count);
  plan_items(call, g, plan);

  const char* error = nullptr;
  auto one = [&](long i, int) {
    if (const char* message = run_item<T, S>(call, g, plan.items[i]))
      __atomic_store_n(&error, message, __ATOMIC_RELAXED);
  };
  constexpr long kSmall = 64 * 1024;  // below ~3 us of work a second thread does not pay
  if (plan.cost * g.head_size < kSmall)
    for (long i = 0; i < plan.count; ++i) one(i, 0);
  else parallel(plan.count, one);
  if (error) return fail("Out of memory for attention.");
  if (plan.partial_floats)
    parallel(plan.count, [&](long i, int) {
      if (plan.items[i].pieces > 1 && plan.items[i].piece == 0) merge<T>(call, g, plan.items[i]);
    });
  return nullptr;
}

}  // namespace

const char* attention(const AttentionCall& call) {
  if (const char* message = check(call)) return message;
  if (call.tokens == 0 || call.sequences == 0) return nullptr;
  switch (call.dtype) {
    case kFloat32:
      return run<float, FloatScores<float>>(call);
    case kFloat16:
      return run<F16, FloatScores<F16>>(call);
    default:
#if defined(__AVX512BF16__)
      return run<Bf16, DotScores>(call);
#else
      return run<Bf16, FloatScores<Bf16>>(call);
#endif
  }
}

}  // namespace ISA_NS
}  // namespace vllm_ms
