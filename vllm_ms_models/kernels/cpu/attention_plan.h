// Attention's work items: how a batch is cut up for the threads. attention.cpp explains the whole.
#pragma once

#include "attention_tile.h"

namespace vllm_ms {
namespace ISA_NS {

constexpr long kTileRows = 64, kSplitKeys = 256;

struct Item {
  long sequence, kv_head, first_token, tokens;  // tokens: within the sequence's query rows
  long begin, end;                              // key positions
  long piece, pieces;
  float* partial;  // pieces > 1: [rows][padded + 2] of this piece
};

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

// Where piece i begins: at a group of positions.
INLINE long cut(long begin, long keys, long i, long pieces) {
  return (begin + keys * i / pieces) / kGroup * kGroup;
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
                                        i ? cut(begin, keys, i, pieces) : begin,
                                        i + 1 < pieces ? cut(begin, keys, i + 1, pieces) : end,
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

}  // namespace ISA_NS
}  // namespace vllm_ms
