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

#include "attention_plan.h"
#include "attention_softmax.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

constexpr long kAhead = 8;  // groups of positions requested from memory before they are multiplied

// out[rows][16 panels] (+)= x * w for the rows of one micro-kernel call.
template <class W>
static void multiply(const typename W::X* x, long x_stride, const char* w, long w_step, long w_panel, long steps,
                     float* out, long out_stride, bool accumulate, int rows, long panels) {
  for (long p = 0; p < panels;) {
    const long left = panels - p;
    int width = 1;
    Tile<W> tile = nullptr;
    if (kPanels >= 3 && left >= 3 && left != 4) tile = TileOf<W, kPanels, kRows>::get(rows), width = kPanels;
    else if (kPanels >= 2 && left >= 2) tile = TileOf<W, (kPanels >= 2 ? 2 : 1), kRows>::get(rows), width = 2;
    else tile = TileOf<W, 1, kRows>::get(rows);
    tile(x, x_stride, w + p * w_panel, w_step, w_panel, steps, out + p * 16, out_stride, accumulate);
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
  long rows, first_row, first_position, query_stride;
  Source source, next_source;

  Source source_of(const Item& of) const {
    return {call.block_tables + of.sequence * call.table_stride,
            static_cast<const char*>(call.cache) + of.kv_head * g.layout.head, call.seq_lens[of.sequence]};
  }

  T* row_of(T* tensor, long r) const {
    return tensor + ((first_row + r / g.group) * call.heads + item.kv_head * g.group + r % g.group) * call.head_size;
  }

  // Requests the keys (`values`: the values) of the group at `position`; beyond the item's end keys of the next item.
  void request_group(long position, bool values) const {
    const Source* from = &source;
    if (position >= item.end) {
      if (!next || values) return;
      position += next->begin / kGroup * kGroup - ceil_div(item.end, kGroup) * kGroup;
      if (position >= next->end) return;
      from = &next_source;
    }
    request(Source::find(g.layout, *from, position) + (values ? g.layout.half : 0), g.layout.group);
  }

  bool begin() {
    const long depth = ceil_div(call.head_size, Direct::kDepth) * Direct::kSubsteps;
    rows = item.tokens * g.group;
    query_stride = depth;
    if (!take_buffers(g, rows, b)) return false;
    const long start = call.query_start[item.sequence], end = call.query_start[item.sequence + 1];
    first_row = start + item.first_token;
    first_position = call.seq_lens[item.sequence] - (end - start) + item.first_token;
    softmax = softmax_of(call);
    source = source_of(item);
    if (next) next_source = source_of(*next);
    T* query = static_cast<T*>(const_cast<void*>(call.query));
    for (long r = 0; r < rows; ++r)
      copy_query(row_of(query, r), reinterpret_cast<X*>(b.query) + r * depth, call.head_size, depth);
    memset(b.out, 0, size_t(rows * g.padded) * 4);
    for (long r = 0; r < rows; ++r) b.m[r] = kNegative, b.l[r] = 0;
    return true;
  }

  // Scores of `count` rows from r on, against the first `groups` groups of a tile.
  void score(const Run* runs, long key, long r, int count, long groups, bool fetch) const {
    const X* query = reinterpret_cast<const X*>(b.query) + r * query_stride;
    const long step = 64;
    for (long at = 0; at < groups; at += runs->groups, ++runs) {
      const long width = min(runs->groups, groups - at);
      if (fetch)
        for (long i = at; i < at + width; ++i)
          if (i + kAhead < groups) request_group(key + (i + kAhead) * kGroup, false);
          else request_group(key + (i + kAhead - groups) * kGroup, true);
      if (runs->direct)
        multiply<Direct>(query, query_stride, runs->keys, Direct::kStepBytes, g.layout.group,
                         ceil_div(call.head_size, Direct::kDepth), b.scores + at * kGroup, kKeys, false, count, width);
      else
        multiply<Copied>(query, query_stride, runs->keys, step, ceil_div(call.head_size, Copied::kDepth) * step,
                         ceil_div(call.head_size, Copied::kDepth), b.scores + at * kGroup, kKeys, false, count, width);
    }
  }

  // Adds the values of the first `groups` groups, weighted by what the scores have become.
  void weigh(const Run* runs, long key, long r, int count, long groups, bool fetch) const {
    const X* shares = reinterpret_cast<const X*>(b.scores);
    float* out = b.out + r * g.padded;
    const long panels = g.padded / 16;
    for (long at = 0; at < groups; at += runs->groups, ++runs) {
      const long width = min(runs->groups, groups - at) * kGroup;
      if (fetch)
        for (long i = at; i < at + runs->groups; ++i)
          if (i + kAhead < groups) request_group(key + (i + kAhead) * kGroup, true);
          else request_group(key + (i + kAhead) * kGroup, false);
      if (runs->direct)
        multiply<Direct>(shares + at * kGroup * Direct::kSubsteps / Direct::kDepth, kKeys, runs->values,
                         call.head_size * Direct::kStepBytes / 16, Direct::kStepBytes, width / Direct::kDepth, out,
                         g.padded, true, count, panels);
      else
        multiply<Copied>(shares + at * kGroup * Copied::kSubsteps / Copied::kDepth, kKeys, runs->values, g.padded * 4,
                         64, width / Copied::kDepth, out, g.padded, true, count, panels);
    }
  }

  // Rows [r, r + count) against a tile.
  void block(const Run* runs, long key, long end, long r, int count, bool fetch) const {
    const long last = first_position + (r + count - 1) / g.group;
    if (call.causal) end = min(end, last + 1);
    if (end <= key) return;
    const long groups = ceil_div(end - key, kGroup), width = groups * kGroup;
    score(runs, key, r, count, groups, fetch);
    for (long i = r; i < r + count; ++i) {
      const long position = first_position + i / g.group;
      const long high = (call.causal ? min(end, position + 1) : end) - key;
      const long low = (call.window ? max(0, position - call.window + 1) : 0) - key;
      const float factor =
          soften_row<X>(b.scores + (i - r) * kKeys, low, high, width, softmax, b.m[i], b.l[i]);
      if (factor == 1.0f) continue;
      float* out = b.out + i * g.padded;
      for (long d = 0; d < g.padded; d += VW) store(out + d, load(out + d) * factor);
    }
    weigh(runs, key, r, count, groups, fetch);
  }

  void attend() const {
    const bool direct = g.direct && rows <= kDirectRows;
    const long height = tile_rows(rows), begin = item.begin / kGroup * kGroup;
    for (long key = begin; key < item.end; key += kKeys) {
      const long end = min(key + kKeys, item.end);
      Run runs[kMaxRuns];
      find_runs<T>(g, source, key, end, direct, b, runs);
      for (long r = 0; r < rows; r += height) block(runs, key, end, r, int(min(height, rows - r)), direct && r == 0);
    }
  }

  void finish() const {
    for (long r = 0; r < rows; ++r) {
      const float* sums = b.out + r * g.padded;
      if (item.partial) {
        float* to = item.partial + r * (g.padded + 2);
        memcpy(to, sums, size_t(g.padded) * 4);
        to[g.padded] = b.m[r];
        to[g.padded + 1] = b.l[r];
      } else {
        write_row(row_of(static_cast<T*>(call.out), r), sums, b.l[r], call.head_size);
      }
    }
  }
};

template <class T>
static const char* run_item(const AttentionCall& call, const Geometry& g, const Item& item, const Item* next) {
  Work<T> work = {call, g, item, next, {}, {}, 0, 0, 0, 0, {}, {}};
  if (!work.begin()) return fail("Out of memory for the attention of %ld rows.", work.rows);
  work.attend();
  work.finish();
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
      const float factor = power_of_two(splat(part[g.padded] - top))[0];
      total += part[g.padded + 1] * factor;
      for (long d = 0; d < g.padded; d += VW) store(sums + d, load(part + d) * factor + (i ? load(sums + d) : vf{}));
    }
    const long token = call.query_start[item.sequence] + item.first_token + r / g.group;
    T* to = static_cast<T*>(call.out) + (token * call.heads + item.kv_head * g.group + r % g.group) * call.head_size;
    write_row(to, sums, total, call.head_size);
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

template <class T>
static const char* run(const AttentionCall& call) {
  Geometry g;
  g.layout = layout_of(call.block_size, call.head_size, call.kv_heads, sizeof(T));
  g.group = call.heads / call.kv_heads;
  g.padded = ceil_div(call.head_size, 16) * 16;
  g.direct = call.head_size % 16 == 0;

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
    if (const char* message = run_item<T>(call, g, plan.items[i], nullptr))
      __atomic_store_n(&error, message, __ATOMIC_RELAXED);
  };
  constexpr long kSmall = 64 * 1024;  // below ~3 us of work a second thread does not pay
  if (plan.cost * call.head_size < kSmall)
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
      return run<float>(call);
    case kFloat16:
      return run<F16>(call);
    default:
      return run<Bf16>(call);
  }
}

}  // namespace ISA_NS
}  // namespace vllm_ms
