// Linear layers with weights of floats; gemm.h has the loops.
//
// Layout of a weight (made by pack.cpp). Output rows are grouped in panels of 16; each part of a fused weight (q|k|v)
// begins with a fresh panel; missing rows are zero. Two parts of one size (gate|up) take turns: panel 2 i is of the
// first, 2 i + 1 of the second. Within a panel the 16 rows are interleaved so that one step along K is contiguous:
//
//     float32, float16   [panel][k][16]
//     bfloat16           [panel][ceil(k/2)][16][2]     pairs along K, what vdpbf16ps multiplies; odd K is padded with 0
//
// A whole weight is read front to back by one row, at full memory bandwidth; the same bytes feed the register-blocked
// micro-kernel (tile.h) for many rows.
//
// Activations. bf16 rows go to vdpbf16ps as they are. Everywhere else they are converted to float32 scratch once per
// call (kActivationBytes at a time), and weights are widened in registers, one or two instructions per R multiply-adds.

#include "gemm.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS

const char* linear(const LinearCall& call) {
  if (call.rows <= 0 || call.weight->panels == 0) return nullptr;
  if (call.weight->bits) return linear_integers(call);
  switch (call.weight->dtype) {
    case kFloat32:
      return multiply_float<Float>(call);
    case kFloat16:
      return multiply_float<Half>(call);
    default:
#if defined(__AVX512BF16__)
      if (call.x_dtype == kBfloat16) return multiply_dots<Dots>(call);
#endif
      return multiply_float<Pairs>(call);
  }
}

}  // namespace ISA_NS
}  // namespace vllm_ms
