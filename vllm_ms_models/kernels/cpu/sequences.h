// Whether a batch's sequences lie within their tables and its cache.
#pragma once

#include "kernels.h"
#include "threads.h"

namespace vllm_ms {

// Null, or what is wrong.
inline const char* check_sequences(const AttentionCall& call) {
  for (long s = 0; s < call.sequences; ++s) {
    const long begin = call.query_start[s], end = call.query_start[s + 1], length = call.seq_lens[s];
    if (begin < 0 || end < begin || end > call.tokens || (end > begin && length < end - begin))
      return fail("paged_attention: sequence %ld has query rows %ld to %ld of %ld and length %ld.", s, begin, end,
                  call.tokens, length);
    if (end == begin) continue;
    const long seen = length - (end - begin) - call.window + 1, first = call.window && seen > 0 ? seen : 0;
    const long blocks = (length + call.block_size - 1) / call.block_size;
    if (blocks > call.table_stride)
      return fail("paged_attention: sequence %ld of length %ld needs more than the %ld blocks of its table.", s, length,
                  call.table_stride);
    for (long i = first / call.block_size; i < blocks; ++i) {
      const long block = call.block_tables[s * call.table_stride + i];
      if (block < 0 || block >= call.num_blocks)
        return fail("paged_attention: block %ld of sequence %ld is %ld, the cache has %ld blocks.", i, s, block,
                    call.num_blocks);
    }
  }
  return nullptr;
}

}  // namespace vllm_ms
