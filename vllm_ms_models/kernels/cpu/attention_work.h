// Attention's work on an item, and on a call; attention.cpp explains it.
//
// T is the type of the query and the result, S that of the cache: T, or int8_t. What differs between them is chosen
// while compiling, so that a cache of floats costs what it would without the other.
#pragma once

#include "attention_plan.h"
#include "attention_softmax.h"

namespace vllm_ms {
namespace ISA_NS {
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
  Ahead ahead = {next, 0, 64, 0, nullptr};
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
template <class T, class S>
struct Work {
  typedef typename Forms<T, S>::Direct Direct;
  typedef typename Forms<T, S>::Copied Copied;
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
        body(r, (token * call.row_heads + item.kv_head * g.group + h) * call.head_size);
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
    return values ? find_values<S>(g.layout, *from, position) : find_group(g.layout, *from, position);
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
      if (const char* keys = group_at((item.begin / kGroup + i) * kGroup, false)) request(keys, g.layout.reach);
    for_rows([&](long r, long at) {
      copy_query(static_cast<const T*>(call.query) + at, reinterpret_cast<X*>(b.query) + r * depth, call.head_size,
                 depth);
    });
    memset(b.out, 0, size_t(rows * g.padded) * 4);
    for (long r = 0; r < rows; r += height)
      for (int i = 0; i < kBlockLanes; ++i) {
        const bool sinks = call.sinks && item.piece == 0 && i < height && r + i < rows;
        b.states[r / height].m[i] = sinks ? call.sinks[item.kv_head * g.group + (r + i) % g.group] * kLog2E : kNegative;
        b.states[r / height].l[i] = sinks;
      }
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
                         count, width, ahead, width * g.layout.reach);
      else
        multiply<Copied>(query, query_stride, runs->keys, 64, copied * 64, copied, to, kKeys, false, count, width,
                         ahead, width * g.layout.reach);
      if constexpr (kIntegers<S>)
        scale_scores(to, kKeys, count, width * kGroup, runs->key_scales);
    }
  }

  // What the scores of `count` rows have become, as the values of a run of `width` positions are multiplied by them.
  const X* shares_of(const Run& run, long at, long width, int count) const {
    if constexpr (kIntegers<S>) {
      float* from = b.scores + at * kGroup;
      X* none = nullptr;
      scale_shares(from, kKeys, count, width, run.value_scales, none);
      return reinterpret_cast<const X*>(from);
    } else {
      return reinterpret_cast<const X*>(b.scores) + at * kGroup * Direct::kSubsteps / Direct::kDepth;
    }
  }

  // Adds the values of the first `groups` groups, weighted by what the scores have become.
  void weigh(const Run* runs, long key, long r, int count, long groups, bool fetch) const {
    float* out = b.out + r * g.padded;
    const long panels = g.padded / 16;
    const long step = kIntegers<S> ? Direct::kStepBytes : call.head_size * Direct::kStepBytes / 16;
    const long panel = kIntegers<S> ? g.layout.block_size * 16 : Direct::kStepBytes;
    for (long at = 0; at < groups; at += runs->groups, ++runs) {
      const long width = min(runs->groups, groups - at) * kGroup;
      const char* ahead = fetch ? ahead_of(key, at, groups, true) : nullptr;
      const X* shares = shares_of(*runs, at, width, count);
      if (runs->direct)
        multiply<Direct>(shares, kKeys, runs->values, step, panel, width / Direct::kDepth, out, g.padded, true, count,
                         panels, ahead, runs->groups * g.layout.reach);
      else
        multiply<Copied>(shares, kKeys, runs->values, g.padded * 4, 64, width / Copied::kDepth, out, g.padded, true,
                         count, panels, ahead, runs->groups * g.layout.reach);
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
    soften_rows<std::conditional_t<kIntegers<S>, Unscaled<X>, X>>(b.scores, kKeys, count, width, softmax.factor, states);
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
      find_runs<T, S>(g, source, key, end, direct, b, runs);
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
        write_row(static_cast<T*>(call.out) + at / call.head_size * call.value_size, sums, states.l[r % height],
                  call.value_size);
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
    T* to = static_cast<T*>(call.out) + (token * call.row_heads + item.kv_head * g.group + r % g.group) * call.value_size;
    write_row(to, sums, total, call.value_size);
  }
}

// Works on items [begin, end); false: out of memory.
template <class T, class S>
static bool run_items(const AttentionCall& call, const Geometry& g, Item* begin, Item* end) {
  for (Item* item = begin; item < end; ++item) {
    Work<T, S> work = {call, g, *item, item + 1 < end ? item + 1 : nullptr, {}, {}, 0, 0, 0, 0, 0, {}, {}};
    if (!work.begin(item == begin)) return false;
    work.attend();
    work.finish();
    if (item->pieces > 1 && __atomic_add_fetch(&item->first->arrived, 1, __ATOMIC_ACQ_REL) == item->pieces)
      merge<T>(call, g, *item->first);
  }
  return true;
}

template <class T, class S>
static const char* run(const AttentionCall& call) {
  Geometry g;
  g.layout = layout_of<S>(call.block_size, call.head_size, call.kv_heads);
  g.group = call.heads / call.kv_heads;
  g.padded = ceil_div(call.value_size, 16) * 16;
  const long threads = thread_count();
  g.tokens = tile_tokens(call, g.group, threads);
  g.direct = call.head_size % 16 == 0 && !call.latent;
  g.latent = call.latent ? call.value_size : 0;
  if (call.latent) g.layout.block = g.layout.head, g.layout.half = 0;

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
    if (!run_items<T, S>(call, g, plan.items + plan.chunks[i], plan.items + plan.chunks[i + 1]))
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
  };
  constexpr long kSmall = 64 * 1024;  // below ~3 us of work a second thread does not pay
  if (plan.cost * call.head_size < kSmall)
    for (long i = 0; i < plan.chunk_count; ++i) one(i, 0);
  else parallel(plan.chunk_count, one);
  return failed ? fail("Out of memory for attention.") : nullptr;
}

}  // namespace
}  // namespace ISA_NS
}  // namespace vllm_ms
