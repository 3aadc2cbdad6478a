// Memory behind the tensors the kernels return; memory.cpp explains it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vllm_ms {

constexpr int kMaxDimensions = 8;

// DLPack 0.x, the ABI MindSpore and PyTorch exchange tensors by.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

// A tensor of `dtype` over memory of its own, aligned to 64 bytes; its deleter recycles the memory. `zeroed` asks for
// memory that is not recycled, in huge pages where possible (weights). Null if memory is exhausted.
DLManagedTensor* new_tensor(int dtype, int dimensions, const int64_t* shape, bool zeroed);

// Bytes waiting to be used again, and the bound of that.
size_t recycled_bytes();
void set_recycling_limit(size_t bytes);

}  // namespace vllm_ms
