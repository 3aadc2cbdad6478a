// Attention over a cache of int8, compiled by itself because the compiler takes as long for it as for all others;
// attention.cpp explains it.

#include "attention_work.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS

// `attention` has checked the call.
const char* attention_int8(const AttentionCall& call) {
  switch (call.dtype) {
    case kFloat32:
      return run<float, int8_t>(call);
    case kFloat16:
      return run<F16, int8_t>(call);
    default:
      return run<Bf16, int8_t>(call);
  }
}

}  // namespace ISA_NS
}  // namespace vllm_ms
