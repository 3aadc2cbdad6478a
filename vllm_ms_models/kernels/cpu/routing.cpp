// Which experts a token goes to (`Routing` in interface.py), a token at a time: a few microseconds for 256 experts, so
// that nothing here is worth vectors. Tokens are shared among the threads.

#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace vllm_ms {
namespace {

constexpr long kTokensAtOnce = 16;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// What one token needs; made once for several.
struct Work {
  std::vector<float> scores, ranks, group_ranks;
  std::vector<char> taken, group_taken;

  explicit Work(const RoutingCall& call)
      : scores(size_t(call.experts)), ranks(scores), group_ranks(size_t(call.groups)), taken(scores.size()),
        group_taken(group_ranks.size()) {}
};

void make_scores(const RoutingCall& call, const float* logits, float* scores) {
  if (call.sigmoid) {
    for (long e = 0; e < call.experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    return;
  }
  float largest = logits[0], total = 0.0f;
  for (long e = 1; e < call.experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
  for (long e = 0; e < call.experts; ++e) total += scores[e] = std::exp(logits[e] - largest);
  for (long e = 0; e < call.experts; ++e) scores[e] /= total;
}

// The first of the best that is not taken yet. There is one.
long take_best(const std::vector<float>& ranks, std::vector<char>& taken) {
  long best = -1;
  for (size_t i = 0; i < ranks.size(); ++i)
    if (!taken[i] && (best < 0 || ranks[i] > ranks[size_t(best)])) best = long(i);
  taken[size_t(best)] = 1;
  return best;
}

// Takes away the experts of all groups but the best.
void exclude_groups(const RoutingCall& call, Work& work) {
  const long size = call.experts / call.groups;
  for (long g = 0; g < call.groups; ++g) {
    float first = kLowest, second = kLowest;
    for (long e = g * size; e < (g + 1) * size; ++e) {
      const float rank = work.ranks[size_t(e)];
      if (rank > first) second = first, first = rank;
      else if (rank > second) second = rank;
    }
    work.group_ranks[size_t(g)] = call.two_best ? first + second : first;
  }
  work.group_taken.assign(work.group_taken.size(), 0);
  work.taken.assign(work.taken.size(), 1);
  for (long i = 0; i < call.top_groups; ++i) {
    const long g = take_best(work.group_ranks, work.group_taken);
    for (long e = g * size; e < (g + 1) * size; ++e) work.taken[size_t(e)] = 0;
  }
}

void choose(const RoutingCall& call, long token, Work& work) {
  make_scores(call, call.logits + token * call.experts, work.scores.data());
  for (long e = 0; e < call.experts; ++e) {
    const float rank = work.scores[size_t(e)] + (call.bias ? call.bias[e] : 0.0f);
    work.ranks[size_t(e)] = std::isnan(rank) ? kLowest : rank;
  }
  if (call.groups > 1) exclude_groups(call, work);
  else work.taken.assign(work.taken.size(), 0);
  int32_t* ids = call.ids + token * call.top_k;
  float *shares = call.shares + token * call.top_k, total = 0.0f;
  for (long k = 0; k < call.top_k; ++k) {
    ids[k] = int32_t(take_best(work.ranks, work.taken));
    total += shares[k] = work.scores[size_t(ids[k])];
  }
  for (long k = 0; k < call.top_k; ++k) {
    if (call.renormalize) shares[k] /= total + 1e-20f;
    shares[k] *= float(call.scale);
  }
}

}  // namespace

const char* choose_experts(const RoutingCall& call) {
  auto body = [](void* context, long chunk, int) {
    const RoutingCall& given = *static_cast<const RoutingCall*>(context);
    const long end = (chunk + 1) * kTokensAtOnce;
    Work work(given);
    for (long token = chunk * kTokensAtOnce; token < end && token < given.tokens; ++token) choose(given, token, work);
  };
  const long chunks = (call.tokens + kTokensAtOnce - 1) / kTokensAtOnce;
  void* context = const_cast<void*>(static_cast<const void*>(&call));
  if (chunks == 1) body(context, 0, 0);
  else run_chunks(chunks, body, context);
  return nullptr;
}

}  // namespace vllm_ms
