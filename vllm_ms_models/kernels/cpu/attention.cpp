// Attention over the paged KV cache with an online softmax, for any mix of prefill and decode.
//
// The cache holds keys and values ready to be multiplied (kv_cache.cpp): keys in panels of 16 positions, values of
// bfloat16 in pairs of positions. So both products are the micro-kernel of tile.h, and a decode step, which multiplies
// each byte only a few times, reads the cache once, as it is.
//
// Tiles. A work item is one KV head of one sequence, up to 64 or 128 rows and a range of key positions. Its rows are
// all query heads that share the KV head (the GQA group) times as many consecutive tokens as fit. It visits kKeys
// positions at a time, and for each micro-kernel's worth of rows (kRows, 8 with AVX-512)
//
//   1. multiplies scores = q * k^T into kRows x kKeys float32 (8 KB, in L1),
//   2. applies soft cap and mask (only to rows that do not see the whole tile), updates maximum m and sum l of all
//      rows at once, and turns scores into probabilities in place,
//   3. adds p * v to the float32 sums, after multiplying those by exp(m_old - m_new) where m changed.
//
// Keys and values of a tile (64 KB in bf16 with head size 64) stay in L2 for all rows. With kDirectRows rows or fewer
// they are multiplied in the cache, block by block; with more, they are copied (and widened, where there is no dot
// product of bfloat16) to make one contiguous tile: 3% of the work of 128 rows, and the micro-kernel then does not stop
// at each block. The group of 16 positions in which a sequence ends is copied as well, with zeros for what lies beyond,
// which may be NaN; so is everything if the head size leaves panels incomplete. attention_tile.h is about this.
//
// Precision. Scores, m, l and sums are float32. With AVX-512 BF16, probabilities of bfloat16 are rounded to bfloat16,
// as the eager attention of transformers does, and multiplied by vdpbf16ps, twice as fast as float32; l is the sum of
// the rounded ones (one more dot product, with ones), so that they still add up to one. Their exponential needs a
// polynomial of degree 3 only. All else computes exponentials to 1e-7 and keeps probabilities in float32.
//
// Memory latency. Blocks are scattered, so the hardware's prefetcher stops at the end of each. In decode, what will be
// multiplied kAhead groups later (16 KB in bf16, head size 64) is requested now: keys, then values of a tile, then the
// next tile, then the next item of the same chunk. The micro-kernel requests a line or two at every step: the same
// lines requested at once before each call fill the core's two dozen miss buffers, wait, and leave them empty during
// the call (13 instead of 22 GB/s over 16384 positions beyond the caches).
//
// Positions outside of [first visible, last visible] of the item's rows are not read, except in the group of 16 in
// which the first lies, nor are their table entries: a sliding window costs what it covers.
//
// Work split. An item that exceeds 1/(3 * threads) of the whole call and has more than 2 * kSplitKeys positions is cut:
// each piece writes its unnormalised sum, m and l to a float32 buffer, and the thread that finishes the last piece
// merges them. Heads alternate within the pieces, so that threads read neighbouring memory. Threads claim chunks of
// consecutive items, each 1/(4 * threads) of what is left: large first, so that one item's end prefetches the next
// one's beginning, small last, so that all finish together. The longest (last) prefill tiles of a sequence come first.

#include "attention_plan.h"
#include "attention_softmax.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

constexpr long kAhead = 8;  // groups of positions requested from memory before they are multiplied

// Panels of the next micro-kernel call when `left` are left: 3, or 2 + 2 for four of them.
INLINE int call_width(long left) {
  if (kPanels >= 3 && left >= 3 && left != 4) return kPanels;
  return kPanels >= 2 && left >= 2 ? 2 : 1;
}

// out[rows][16 panels] (+)= x * w for the rows of one micro-kernel call; meanwhile `bytes` from `next` are requested.
template <class W>
static void multiply(const typename W::X* x, long x_stride, const char* w, long w_step, long w_panel, long steps,
                     float* out, long out_stride, bool accumulate, int rows, long panels, const char* next,
                     long bytes) {
  Ahead ahead = {next, 0, 64, 0};
  if (next && rows <= kFewRows) {  // one or two rows: the micro-kernel does not
    for (long line = 0; line < bytes; line += 64) __builtin_prefetch(next + line);
  } else if (next) {
    long calls = 0;
    for (long p = 0; p < panels; p += call_width(panels - p)) ++calls;
    ahead.lines = int(ceil_div(bytes, 64 * steps * calls));
    ahead.move = ahead.lines * 64;
  }
  for (long p = 0; p < panels;) {
    const int width = call_width(panels - p);
    const Tile<W> tile = width == 1   ? TileOf<W, 1, kRows>::get(rows)
                         : width == 2 ? TileOf<W, (kPanels >= 2 ? 2 : 1), kRows>::get(rows)
                                      : TileOf<W, kPanels, kRows>::get(rows);
    tile(x, x_stride, w + p * w_panel, w_step, w_panel, steps, out + p * 16, out_stride, accumulate, ahead);
    ahead.at += ahead.move * steps;
    p += width;
  }
}

// Divides a row of sums by l.
template <class T>
static void write_row(T* to, const float* sums, float l, long head_size) {
  const float scale = l > 0 ? 1.0f / l : l == 0 ? 0.0f : l;
  long d = 0;
  for (; d + VW <= head_size; d += VW) store(to + d, load(sums + d) * scale);
  if (d < head_size) store_some(to + d, load(sums + d) * scale, head_size - d);
}

// An item at work.
template <class T>
struct Work {
  typedef typename Forms<T>::Direct Direct;
  typedef typename Forms<T>::Copied Copied;
  typedef typename Direct::X X;

  const AttentionCall& call;
  const Geometry& g;
  const Item& item;
  const Item* next;  // what this thread does then, or null
  Softmax softmax;
  Buffers b;
  long rows, height, first_row, first_position, query_stride;
  Source source, next_source;

  Source source_of(const Item& of) const {
    return {call.block_tables + of.sequence * call.table_stride,
            static_cast<const char*>(call.cache) + of.kv_head * g.layout.head, call.seq_lens[of.sequence]};
  }

  // body(row of the item, where it begins in query and out).
  template <class Body>
  void for_rows(const Body& body) const {
    for (long r = 0, token = first_row; r < rows; ++token)
      for (long h = 0; h < g.group; ++h, ++r)
        body(r, (token * call.heads + item.kv_head * g.group + h) * call.head_size);
  }

  // The keys (`values`: the values) of the group at `position`; beyond the item's end keys of the next item, or null.
  const char* group_at(long position, bool values) const {
    const Source* from = &source;
    if (position >= item.end) {
      if (!next || values) return nullptr;
      position += next->begin / kGroup * kGroup - ceil_div(item.end, kGroup) * kGroup;
      if (position >= next->end) return nullptr;
      from = &next_source;
    }
    return find_group(g.layout, *from, position) + (values ? g.layout.half : 0);
  }

  // What is needed kAhead groups after group `at` of a tile of `groups`. After the keys of a tile come its values, then
  // the keys of the next one.
  const char* ahead_of(long key, long at, long groups, bool values) const {
    at += kAhead;
    if (at < groups) return group_at(key + at * kGroup, values);
    return values ? group_at(key + at * kGroup, false) : group_at(key + (at - groups) * kGroup, true);
  }

  bool begin(bool fetch) {
    const long depth = ceil_div(call.head_size, Direct::kDepth) * Direct::kSubsteps;
    rows = item.tokens * g.group;
    query_stride = depth;
    height = tile_rows(rows);
    if (!take_buffers(g, rows, b)) return false;
    const long start = call.query_start[item.sequence], end = call.query_start[item.sequence + 1];
    first_row = start + item.first_token;
    first_position = call.seq_lens[item.sequence] - (end - start) + item.first_token;
    softmax = softmax_of(call);
    source = source_of(item);
    if (next) next_source = source_of(*next);
    for (long i = 0; fetch && i < kAhead; ++i)
      if (const char* keys = group_at((item.begin / kGroup + i) * kGroup, false)) request(keys, g.layout.group);
    for_rows([&](long r, long at) {
      copy_query(static_cast<const T*>(call.query) + at, reinterpret_cast<X*>(b.query) + r * depth, call.head_size,
                 depth);
    });
    memset(b.out, 0, size_t(rows * g.padded) * 4);
    for (long r = 0; r < rows; r += height)
      for (int i = 0; i < kBlockLanes; ++i) b.states[r / height].m[i] = kNegative, b.states[r / height].l[i] = 0;
    return true;
  }

  // Scores of `count` rows from r on, against the first `groups` groups of a tile.
  void score(const Run* runs, long key, long r, int count, long groups, bool fetch) const {
    const X* query = reinterpret_cast<const X*>(b.query) + r * query_stride;
    const long steps = ceil_div(call.head_size, Direct::kDepth), copied = ceil_div(call.head_size, Copied::kDepth);
    for (long at = 0; at < groups; at += runs->groups, ++runs) {
      const long width = min(runs->groups, groups - at);
      float* to = b.scores + at * kGroup;
      const char* ahead = fetch ? ahead_of(key, at, groups, false) : nullptr;
      if (runs->direct)
        multiply<Direct>(query, query_stride, runs->keys, Direct::kStepBytes, g.layout.group, steps, to, kKeys, false,
                         count, width, ahead, width * g.layout.group);
      else
        multiply<Copied>(query, query_stride, runs->keys, 64, copied * 64, copied, to, kKeys, false, count, width,
                         ahead, width * g.layout.group);
    }
  }

  // Adds the values of the first `groups` groups, weighted by what the scores have become.
  void weigh(const Run* runs, long key, long r, int count, long groups, bool fetch) const {
    const X* shares = reinterpret_cast<const X*>(b.scores);
    float* out = b.out + r * g.padded;
    const long panels = g.padded / 16;
    for (long at = 0; at < groups; at += runs->groups, ++runs) {
      const long width = min(runs->groups, groups - at) * kGroup;
      const char* ahead = fetch ? ahead_of(key, at, groups, true) : nullptr;
      if (runs->direct)
        multiply<Direct>(shares + at * kGroup * Direct::kSubsteps / Direct::kDepth, kKeys, runs->values,
                         call.head_size * Direct::kStepBytes / 16, Direct::kStepBytes, width / Direct::kDepth, out,
                         g.padded, true, count, panels, ahead, runs->groups * g.layout.group);
      else
        multiply<Copied>(shares + at * kGroup * Copied::kSubsteps / Copied::kDepth, kKeys, runs->values, g.padded * 4,
                         64, width / Copied::kDepth, out, g.padded, true, count, panels, ahead,
                         runs->groups * g.layout.group);
    }
  }

  // Rows [r, r + count) against a tile.
  void block(const Run* runs, long key, long end, long r, int count, bool fetch) const {
    const long last = first_position + (r + count - 1) / g.group;
    if (call.causal) end = min(end, last + 1);
    if (end <= key) return;
    const long groups = ceil_div(end - key, kGroup), width = groups * kGroup;
    score(runs, key, r, count, groups, fetch);
    for (int i = 0; i < count; ++i) {
      const long position = first_position + (r + i) / g.group;
      const long high = (call.causal ? min(end, position + 1) : end) - key;
      const long low = (call.window ? position - call.window + 1 : 0) - key;
      float* scores = b.scores + i * kKeys;
      if (softmax.transform) transform_scores(scores, width, softmax);
      if (low > 0 || high < width) mask_scores(scores, low, high, width);
    }
    RowStates& states = b.states[r / height];
    soften_rows<X>(b.scores, kKeys, count, width, softmax.factor, states);
    for (int i = 0; i < count; ++i) {
      const float factor = states.shrink[i];
      if (factor == 1.0f) continue;
      float* out = b.out + (r + i) * g.padded;
      for (long d = 0; d < g.padded; d += VW) store(out + d, load(out + d) * factor);
    }
    weigh(runs, key, r, count, groups, fetch);
  }

  void attend() const {
    const bool direct = g.direct && rows <= kDirectRows;
    const long begin = item.begin / kGroup * kGroup;
    for (long key = begin; key < item.end; key += kKeys) {
      const long end = min(key + kKeys, item.end);
      Run runs[kMaxRuns];
      find_runs<T>(g, source, key, end, direct, b, runs);
      for (long r = 0; r < rows; r += height) block(runs, key, end, r, int(min(height, rows - r)), direct && r == 0);
    }
  }

  void finish() const {
    for_rows([&](long r, long at) {
      const float* sums = b.out + r * g.padded;
      const RowStates& states = b.states[r / height];
      if (item.partial) {
        float* to = item.partial + r * (g.padded + 2);
        memcpy(to, sums, size_t(g.padded) * 4);
        to[g.padded] = states.m[r % height];
        to[g.padded + 1] = states.l[r % height];
      } else {
        write_row(static_cast<T*>(call.out) + at, sums, states.l[r % height], call.head_size);
      }
    });
  }
};

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
      const float factor = power_of_two(splat(part[g.padded] - top))[0];
      total += part[g.padded + 1] * factor;
      for (long d = 0; d < g.padded; d += VW) store(sums + d, load(part + d) * factor + (i ? load(sums + d) : vf{}));
    }
    const long token = call.query_start[item.sequence] + item.first_token + r / g.group;
    T* to = static_cast<T*>(call.out) + (token * call.heads + item.kv_head * g.group + r % g.group) * call.head_size;
    write_row(to, sums, total, call.head_size);
  }
}

// Works on items [begin, end); false: out of memory.
template <class T>
static bool run_items(const AttentionCall& call, const Geometry& g, Item* begin, Item* end) {
  for (Item* item = begin; item < end; ++item) {
    Work<T> work = {call, g, *item, item + 1 < end ? item + 1 : nullptr, {}, {}, 0, 0, 0, 0, 0, {}, {}};
    if (!work.begin(item == begin)) return false;
    work.attend();
    work.finish();
    if (item->pieces > 1 && __atomic_add_fetch(&item->first->arrived, 1, __ATOMIC_ACQ_REL) == item->pieces)
      merge<T>(call, g, *item->first);
  }
  return true;
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

template <class T>
static const char* run(const AttentionCall& call) {
  Geometry g;
  g.layout = layout_of(call.block_size, call.head_size, call.kv_heads, sizeof(T));
  g.group = call.heads / call.kv_heads;
  g.padded = ceil_div(call.head_size, 16) * 16;
  const long threads = thread_count();
  g.tokens = tile_tokens(call, g.group, threads);
  g.direct = call.head_size % 16 == 0;

  Plan plan = {};
  plan_items(call, g, plan);
  if (threads > 1) {
    plan.target = max(1, plan.cost / (3 * threads));
    plan_items(call, g, plan);
  }
  plan.partials = static_cast<float*>(scratch(Slot::kPartials, size_t(plan.partial_floats) * 4));
  const size_t item_bytes = size_t(plan.count) * sizeof(Item), chunk_bytes = size_t(plan.count + 1) * sizeof(long);
  plan.items = static_cast<Item*>(scratch(Slot::kItems, item_bytes + chunk_bytes));
  if (!plan.items || !plan.partials) return fail("Out of memory for %ld attention items.", plan.count);
  plan.chunks = reinterpret_cast<long*>(plan.items + plan.count);
  plan_items(call, g, plan);
  plan_chunks(g, plan, threads);

  bool failed = false;
  auto one = [&](long i, int) {
    if (!run_items<T>(call, g, plan.items + plan.chunks[i], plan.items + plan.chunks[i + 1]))
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
  };
  constexpr long kSmall = 64 * 1024;  // below ~3 us of work a second thread does not pay
  if (plan.cost * call.head_size < kSmall)
    for (long i = 0; i < plan.chunk_count; ++i) one(i, 0);
  else parallel(plan.chunk_count, one);
  return failed ? fail("Out of memory for attention.") : nullptr;
}

}  // namespace

const char* attention(const AttentionCall& call) {
  if (const char* message = check(call)) return message;
  if (call.tokens == 0 || call.sequences == 0) return nullptr;
  switch (call.dtype) {
    case kFloat32:
      return run<float>(call);
    case kFloat16:
      return run<F16>(call);
    default:
      return run<Bf16>(call);
  }
}

}  // namespace ISA_NS
}  // namespace vllm_ms
