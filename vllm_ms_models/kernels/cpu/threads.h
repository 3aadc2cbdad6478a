// A small pool of threads and per-thread scratch memory; threads.cpp explains them.
#pragma once

#include <cstddef>

namespace vllm_ms {

// Calls `body(context, chunk, thread)` once for every chunk in [0, chunks), on this thread and the pool's workers.
// Chunks are handed out in ascending order to whoever is free. `thread` is in [0, thread_count()).
// Nested and concurrent calls run their chunks on the calling thread alone, as thread 0.
void run_chunks(long chunks, void (*body)(void* context, long chunk, int thread), void* context);

// Threads a call uses, the calling one included: 1 within a chunk.
int thread_count();

// Most threads a pool created from now on may have (OMP_NUM_THREADS); 0: as many as the affinity mask has CPUs.
void set_thread_limit(int count);

// Forces the number of threads (>= 1); 0 returns to affinity mask and limit.
void set_thread_count(int count);

// At least `bytes` bytes of memory aligned to 64, private to the calling thread, kept until the thread ends.
// Each slot is one buffer: a second request for the same slot invalidates the first. Null if memory is exhausted.
enum class Slot { kActivations, kFactors, kTile, kAttention, kItems, kPartials, kHeads, kExperts, kLatents, kExpanded, kLowRank, kCount };
void* scratch(Slot slot, size_t bytes);

// Writes a printf-style message that the binding turns into a ValueError; returns it for `return fail(...)`.
const char* fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace vllm_ms
