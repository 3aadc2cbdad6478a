// Collectives of `Ranks`; collectives.cpp explains them.
//
// All ranks call the same one with equal sizes. Each returns null, or what `Ranks::meet` said.
#pragma once

#include "kernels.h"
#include "ranks.h"

namespace vllm_ms {
namespace collectives {

// `x`: the sum of every rank's, in place, the same to the bit on every rank.
const char* all_reduce(Ranks& ranks, AddParts add, void* x, int dtype, long items);

// `out` `[items]`: of the sum of every rank's `x` `[size, items]`, the row of this rank's number.
const char* reduce_scatter(Ranks& ranks, AddParts add, const void* x, void* out, int dtype, long items);

// `out` `[rows, size, bytes]` of every rank's `x` `[rows, bytes]`.
const char* all_gather(Ranks& ranks, const void* x, void* out, long rows, long bytes);

// `out` `[size, bytes]` has at i what is at this rank's number in rank i's `x` `[size, bytes]`.
const char* all_to_all(Ranks& ranks, const void* x, void* out, long bytes);

// `x`: that of rank `source`.
const char* broadcast(Ranks& ranks, int source, void* x, long bytes);

const char* barrier(Ranks& ranks);

}  // namespace collectives
}  // namespace vllm_ms
