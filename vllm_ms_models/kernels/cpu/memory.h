// Memory behind the tensors the kernels return; memory.cpp explains it.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace vllm_ms {

constexpr int kMaxDimensions = 8;

// Memory of one result, and what is in it.
struct Buffer {
  void* data;
  int dtype, dimensions;
  size_t bytes;
  ssize_t shape[kMaxDimensions], strides[kMaxDimensions];  // strides in bytes
};

// A buffer aligned to 64 bytes. `zeroed` asks for memory that is not recycled, in huge pages where possible (weights).
// Null if memory is exhausted.
Buffer* new_buffer(int dtype, int dimensions, const int64_t* shape, bool zeroed);

// Nothing sees the buffer any more. From any thread.
void recycle(Buffer* buffer);

// Bytes waiting to be used again; the bound of those and of what is in use together; giving back all but `bytes`.
size_t recycled_bytes();
void set_recycling_limit(size_t bytes);
void trim_recycled(size_t bytes);

}  // namespace vllm_ms
