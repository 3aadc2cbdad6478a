// Attention's work items: how a batch is cut up for the threads. attention.cpp explains the whole.
#pragma once

#include "attention_tile.h"

namespace vllm_ms {
namespace ISA_NS {

constexpr long kSplitKeys = 256;

struct Item {
  long sequence, kv_head, first_token, tokens;  // tokens: within the sequence's query rows
  long begin, end;                              // key positions
  long piece, pieces;
  float* partial;  // pieces > 1: [rows][padded + 2] of this piece, those of the next ones follow
  Item* first;     // piece 0
  long arrived;    // of piece 0: how many of the pieces are done
};

struct Plan {
  Item* items;      // null while counting
  long* chunks;     // set with `items`: chunk i is items [chunks[i], chunks[i + 1])
  float* partials;  // set with `items`
  long count, cost, chunk_count;
  long target;  // cost above which an item is split; 0: never
  long partial_floats;
};

INLINE long cost_of(long keys, long rows) { return keys * (rows + 8); }

INLINE long pieces_of(const Plan& plan, long keys, long rows) {
  if (!plan.target) return 1;
  return max(1, min(ceil_div(cost_of(keys, rows), plan.target), keys / kSplitKeys));
}

// Where piece i begins: at a group of positions.
INLINE long cut(long begin, long keys, long i, long pieces) { return (begin + keys * i / pieces) / kGroup * kGroup; }

// Tokens of an item: kManyRows rows if that leaves each thread plenty of items, kTileRows otherwise.
INLINE long tile_tokens(const AttentionCall& call, long group, long threads) {
  constexpr long kTileRows = 64, kManyRows = 128, kPlenty = 16;
  const bool many = call.tokens * call.heads / kManyRows >= kPlenty * threads;
  return max(1, (many ? kManyRows : kTileRows) / group);
}

// Visits every item: counts them and sums their costs, and fills `plan.items` if it is set.
static void plan_items(const AttentionCall& call, const Geometry& g, Plan& plan) {
  plan.count = plan.cost = plan.partial_floats = 0;
  for (long s = 0; s < call.sequences; ++s) {
    const long queries = call.query_start[s + 1] - call.query_start[s], length = call.seq_lens[s];
    for (long t = ceil_div(queries, g.tokens) - 1; t >= 0; --t) {
      const long first = t * g.tokens, tokens = min(g.tokens, queries - first), rows = tokens * g.group;
      const long position = length - queries + first;
      const long begin = call.window ? max(0, position - call.window + 1) : 0;
      const long end = call.causal ? position + tokens : length, keys = end - begin;
      const long pieces = pieces_of(plan, keys, rows), floats = pieces > 1 ? rows * (g.padded + 2) : 0;
      for (long i = 0; i < pieces && plan.items; ++i)
        for (long h = 0; h < call.kv_heads; ++h) {
          Item* item = plan.items + plan.count;
          float* partial = plan.partials + plan.partial_floats + (h * pieces + i) * floats;
          item[i * call.kv_heads + h] = {s,
                                         h,
                                         first,
                                         tokens,
                                         i ? cut(begin, keys, i, pieces) : begin,
                                         i + 1 < pieces ? cut(begin, keys, i + 1, pieces) : end,
                                         i,
                                         pieces,
                                         floats ? partial : nullptr,
                                         item + h,
                                         0};
        }
      plan.partial_floats += call.kv_heads * pieces * floats;
      plan.count += call.kv_heads * pieces;
      plan.cost += call.kv_heads * cost_of(keys, rows);
    }
  }
}

// Items that one thread takes in a row: as many as make up 1/(4 * threads) of what is left, so that the last are small.
static void plan_chunks(const Geometry& g, Plan& plan, long threads) {
  long left = plan.cost, target = 0, cost = 0;
  plan.chunk_count = 0;
  for (long i = 0; i < plan.count; ++i) {
    if (cost >= target) {
      plan.chunks[plan.chunk_count++] = i;
      left -= cost;
      cost = 0;
      target = left / (4 * threads);
    }
    const Item& item = plan.items[i];
    cost += cost_of(item.end - item.begin, item.tokens * g.group);
  }
  plan.chunks[plan.chunk_count] = plan.count;
}

}  // namespace ISA_NS
}  // namespace vllm_ms
