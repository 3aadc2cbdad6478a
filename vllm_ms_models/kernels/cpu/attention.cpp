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

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

constexpr float kNegative = -__builtin_inff();

// How scores become exponents of two: the running maximum is kept in these units, so that a probability is
// 2^(score * factor - maximum), one multiply-add and `power_of_two`.
struct Softmax {
  float scale, cap;  // cap 0: none
  bool transform;    // scores are scaled and capped in a pass of their own, `factor` is log2(e)
  float factor;      // scale * log2(e) otherwise
};

INLINE Softmax softmax_of(const AttentionCall& call) {
  constexpr float kLog2E = 1.44269504f;
  const bool transform = call.soft_cap > 0 || !(call.scale > 0);
  return {float(call.scale), float(call.soft_cap), transform,
          transform ? kLog2E : float(call.scale * 1.4426950408889634)};
}

// Largest visible score of a row; scores outside of [low, high) become -inf.
static float top_score(float* scores, long low, long high, long width, const Softmax& softmax) {
  vf top = splat(kNegative);
  const bool partial = low > 0 || high < width;
  for (long i = 0; i < width; i += VW) {
    vf s = load(scores + i);
    if (softmax.transform) {
      s *= softmax.scale;
      if (softmax.cap > 0) s = softmax.cap * hyperbolic_tangent(s / softmax.cap);
    }
    if (partial) {
      vi at = kLanes + int(i);
      s = select((at >= int(low)) & (at < int(high)), s, splat(kNegative));
    }
    top = vmax(s, top);
    if (partial || softmax.transform) store(scores + i, s);
  }
  return largest(top);
}

// Turns one row of scores, visible in [low, high), into probabilities relative to the running maximum m; l is their
// sum. Returns the factor by which everything summed so far has to be multiplied.
static float soften(float* scores, long low, long high, long width, const Softmax& softmax, float& m, float& l) {
  if (low >= high) {
    memset(scores, 0, size_t(width) * sizeof(float));
    return 1.0f;
  }
  float next = top_score(scores, low, high, width, softmax) * softmax.factor;
  next = next > m ? next : m;
  if (next == kNegative) next = 0;  // all visible scores are NaN or -inf
  const bool partial = low > 0 || high < width;
  vf total = {};
  for (long i = 0; i < width; i += VW) {
    vf s = load(scores + i), p = power_of_two(s * softmax.factor - next);
    if (partial) p = select(s == splat(kNegative), vf{}, p);
    total += p;
    store(scores + i, p);
  }
  const float shrink = m == next ? 1.0f : power_of_two(splat(m - next))[0];
  l = l * shrink + sum(total);
  m = next;
  return shrink;
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
  const Softmax softmax = softmax_of(call);
  for (long r = 0; r < rows; ++r)
    copy_query<T, S>(
        static_cast<const T*>(call.query) + ((first_row + r / g.group) * call.heads + head + r % g.group) * g.head_size,
        reinterpret_cast<int32_t*>(b.query) + r * depth, g.head_size);
  memset(b.out, 0, size_t(rows * g.padded) * 4);
  for (long r = 0; r < rows; ++r) b.m[r] = kNegative, b.l[r] = 0;

  for (long key = item.begin; key < item.end; key += kKeys) {
    const long count = min(kKeys, item.end - key), width = ceil_div(count, 16) * 16;
    load_tile<T, S>(call, g, item.sequence, item.kv_head, key, count, item.end, b);
    multiply_block<typename S::W>(reinterpret_cast<const typename S::W::X*>(b.query), depth, b.keys, 64, depth * 64,
                                  depth, b.scores, kKeys, false, rows, width / 16);
    for (long r = 0; r < rows; ++r) {
      const long position = first_position + r / g.group;
      const long high = min(call.causal ? position + 1 : length, key + count) - key;
      const long low = max(call.window ? position - call.window + 1 : 0, key) - key;
      const float factor = soften(b.scores + r * kKeys, low, high, width, softmax, b.m[r], b.l[r]);
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
      float factor = power_of_two(splat(part[g.padded] - top))[0];
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
