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
// A cache of int8 is multiplied as integers: decode widens them in registers, once for all rows of a micro-kernel call,
// and copies hold them widened. They are bfloat16 numbers, so nothing is rounded. What belongs to a position are its
// scales: after a run of groups is multiplied, scores are multiplied by those of the keys; before the run's values are,
// probabilities by those of the values, unless they are 0 (what a row does not see may have NaN for a scale). The sum l
// is that of probabilities without scales. No group is copied because of what lies beyond the sequence: integers are
// finite. The two passes over scores and probabilities in L1 and the widening of copies are 4% of a prefill. Decode of
// one sequence over 16384 positions takes 0.74 times as long as in bf16 with 4 rows to a KV head, and 0.78 with 7 (two
// threads; one thread is limited by its multipliers then); without vdpbf16ps all are, and it is 1.1 to 1.2.
//
// A sink (gpt-oss) is the score of one more position, which has no value: m begins with it and l with 1, in the first
// piece of an item only.
//
// A cache of latents (multi-head latent attention) has one row for each position, key and value of all heads: a KV head
// whose group is all heads. Its tiles are always copied (attention_latent.h); nothing else differs.
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

#include "attention_work.h"
#include "sequences.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

template <class T>
static const char* run(const AttentionCall& call) {
  return call.int8_cache ? run<T, int8_t>(call) : run<T, T>(call);
}

}  // namespace

const char* attention(const AttentionCall& call) {
  if (const char* message = check_sequences(call)) return message;
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
