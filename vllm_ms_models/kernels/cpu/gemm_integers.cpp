// Linear layers with weights of small integers (`Integers` in interface.py); gemm.h has the loops.
//
// Layout of a weight (made by pack_integers.cpp): panels of 16 rows, as those of floats (gemm.cpp). Within a panel:
//
//     8 bits, int8 activations    [ceil(k/4)][16][4]    values + 128, unsigned (tile_integers.h says why)
//     8 bits, float activations   [k][16]               two's complement, as all that follow
//     4 bits, float activations   [ceil(k/8)][16]       words of 32 bits, each 8 inputs of a row
//
// and after all panels what belongs to them:
//
//     scales     [panel][group][16]   float32
//     addends    [panel][16]          int32; int8 activations only
//     zeros      [panel][group][16]   int8; no memory is used before a zero point is not 0
//
// One row thus reads 8.5 bits a weight for W8A16 in groups of 64 or 4.25 for W4A16 in groups of 128.
//
// int8 activations. Rows are rounded into scratch (quantize.h), then the loops run over sums of int32, which are exact;
// gemm_scales.h turns them to float32. A dot product of bytes does twice the work of one of bf16, in half the bytes:
// everything said in gemm.h about the ratio of memory, caches and multipliers holds. If the static inputs of parts
// differ, the rows are rounded for each part, and panels multiplied one by one.
//
// Float activations. Weights are widened in registers, once for the R rows of a micro-kernel call. A group is one call;
// its sums go to a small buffer in L1, and from there, scaled, to those of the row: for groups of 128 that is an
// instruction for every 20 multiply-adds. A zero point is multiplied by the sum of the group's activations, made once a
// call, instead of being subtracted from every weight; without zero points there is nothing to do. Groups are multiples
// of 16, hence of whole steps; a short last one ends in zeros.

#include "gemm.h"
#include "quantize.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

// Calls function(x) with `x` as a pointer to its type.
template <class Function>
static void typed(const void* x, int dtype, const Function& function) {
  if (dtype == kFloat32) function(static_cast<const float*>(x));
  else if (dtype == kBfloat16) function(static_cast<const Bf16*>(x));
  else function(static_cast<const F16*>(x));
}

// Whether the parts share their static input.
static bool one_input(const Packed& weight) {
  for (int part = 1; weight.input == Input::kStatic && part < weight.parts; ++part)
    if (weight.input_scale[part] != weight.input_scale[0] || weight.input_offset[part] != weight.input_offset[0])
      return false;
  return true;
}

static const char* multiply_rounded(const LinearCall& call) {
  const Packed& weight = *call.weight;
  const long k = weight.in_features, stride = rounded_stride(k), inputs = one_input(weight) ? 1 : weight.parts;
  const long block = min(call.rows, max(kRows * kRowBlocks, kActivationBytes / (stride * inputs)));
  char* x = static_cast<char*>(scratch(Slot::kActivations, size_t(inputs * block * stride)));
  float* scale = static_cast<float*>(scratch(Slot::kFactors, size_t(inputs * block) * 8));
  if (!x || !scale) return fail("Out of memory for %ld activations.", inputs * block * k);
  int32_t* total = reinterpret_cast<int32_t*>(scale + inputs * block);
  for (long row = 0; row < call.rows; row += block) {
    const long rows = min(block, call.rows - row);
    typed(static_cast<const char*>(call.x) + row * k * dtype_size(call.x_dtype), call.x_dtype, [&](const auto* from) {
      for (int part = 0; part < inputs; ++part)
        quantize_rows(from, weight, part, rows, x + part * rows * stride, scale + part * rows, total + part * rows);
    });
    const Factors factors = {inputs, rows, scale, total};
    multiply_rows<IntegerProducts>({call, reinterpret_cast<uint32_t*>(x), stride / 4, row, rows, factors});
  }
  return nullptr;
}

}  // namespace

const char* linear_integers(const LinearCall& call) {
  const Packed& weight = *call.weight;
  if (weight.input != Input::kFloat) return multiply_rounded(call);
  Factors factors;
  factors.groups = weight.groups;
  if (weight.has_zeros) {
    float* totals = static_cast<float*>(scratch(Slot::kFactors, size_t(call.rows * weight.groups) * sizeof(float)));
    if (!totals) return fail("Out of memory for %ld activations.", call.rows);
    typed(call.x, call.x_dtype, [&](const auto* x) { sum_groups(x, weight, call.rows, totals); });
    factors.group_total = totals;
  }
#if defined(__AVX512BF16__)
  if (call.x_dtype == kBfloat16)
    return weight.bits == 8 ? multiply_dots<ByteDots>(call, factors) : multiply_dots<NibbleDots>(call, factors);
#endif
  return weight.bits == 8 ? multiply_float<Bytes>(call, factors) : multiply_float<Nibbles>(call, factors);
}

}  // namespace ISA_NS
}  // namespace vllm_ms
