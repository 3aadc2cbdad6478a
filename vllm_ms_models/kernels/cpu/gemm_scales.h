// From the sums of a micro-kernel to float32 sums, for weights of small integers (gemm_integers.cpp): scales, zero points
// and addends. Weights of floats pass through. Part of gemm.h.
#pragma once

#include "kernels.h"
#include "tile_integers.h"

namespace vllm_ms {
namespace ISA_NS {
namespace {

constexpr long kTileSums = 16 * (kRows * kPanels > kFewRows * kFewPanels ? kRows * kPanels : kFewRows * kFewPanels);

template <class W>
constexpr bool kScaled = std::is_base_of<Scaled, W>::value;  // integers
template <class W>
constexpr bool kRounded = std::is_same<typename W::Acc, vi>::value;  // times integers

// What must be known of the rows of activations.
struct Factors {
  long inputs = 1, rows = 0;           // `inputs` is the number of parts if each has rows of its own
  const float* scale = nullptr;        // [inputs][rows]; NaN for a row that is not finite
  const int32_t* total = nullptr;      // [inputs][rows] sums of their integers
  const float* group_total = nullptr;  // [rows][groups] sums of floats; if there are zero points
  long groups = 1;

  Factors from_row(long row) const {
    Factors later = *this;
    if (later.group_total) later.group_total += row * groups;
    return later;
  }
};

INLINE vf zero_points(const Packed& weight, long at) { return from_int8(load_raw<vb>(weight.zeros + at)); }

// sums (+)= scale * (part - zero * group_total), for one group of `width` panels and `rows` rows from `row` of `factors`.
// Requests the scales of panels from `next` on, which will be wanted when these are done.
static void add_group(const Packed& weight, const Factors& factors, long panel, int width, long group,
                      const float* part, long row, long rows, float* sums, long stride, bool accumulate, long next) {
  for (int p = 0; p < width; ++p) {
    const long at = ((panel + p) * weight.groups + group) * 16;
    __builtin_prefetch(weight.scales + ((next + p) * weight.groups + group) * 16);
    UNROLL for (int i = 0; i < 16; i += VW) {
      const vf scale = load(weight.scales + at + i), zero = weight.has_zeros ? zero_points(weight, at + i) : vf{};
      for (long r = 0; r < rows; ++r) {
        vf sum = load(part + (r * width + p) * 16 + i);
        if (weight.has_zeros) sum -= zero * factors.group_total[(row + r) * factors.groups + group];
        float* to = sums + r * stride + p * 16 + i;
        store(to, accumulate ? load(to) + scale * sum : scale * sum);
      }
    }
  }
}

// The same in place for a weight of one group.
static float* scale_sums(const Packed& weight, const Factors& factors, long panel, int panels, float* sums,
                         long stride, long row, long rows) {
  for (int p = 0; p < panels; ++p)
    UNROLL for (int i = 0; i < 16; i += VW) {
      const long at = (panel + p) * 16 + i;
      const vf scale = load(weight.scales + at), zero = weight.has_zeros ? zero_points(weight, at) : vf{};
      for (long r = 0; r < rows; ++r) {
        float* to = sums + r * stride + p * 16 + i;
        const vf sum = load(to);
        store(to, scale * (weight.has_zeros ? sum - zero * factors.group_total[row + r] : sum));
      }
    }
  return sums;
}

// float(sum - (zero + 128) * total + addend) * (row's scale * scale), in place: weights are stored with 128 added.
// Unsigned arithmetic, because what overflows comes back.
static float* scale_sums(const Packed& weight, const Factors& factors, long panel, int panels, int32_t* sums,
                         long stride, long row, long rows) {
  for (int p = 0; p < panels; ++p) {
    const long first = (factors.inputs > 1 ? part_of(weight, panel + p) * factors.rows : 0) + row;
    UNROLL for (int i = 0; i < 16; i += VW) {
      const long at = (panel + p) * 16 + i;
      const vf scale = load(weight.scales + at);
      const vu zero = (weight.has_zeros ? (vu)__builtin_convertvector(zero_points(weight, at), vi) : vu{}) + 128;
      const vu addend = load_raw<vu>(weight.addends + at);
      for (long r = 0; r < rows; ++r) {
        int32_t* to = sums + r * stride + p * 16 + i;
        const vu sum = load_raw<vu>(to) - zero * uint32_t(factors.total[first + r]) + addend;
        store_raw(to, __builtin_convertvector((vi)sum, vf) * (scale * factors.scale[first + r]));
      }
    }
  }
  return reinterpret_cast<float*>(sums);
}

template <class W>
static float* finish(const Packed& weight, const Factors& factors, long panel, int panels, Sum<W>* sums, long stride,
                     long row, long rows) {
  if constexpr (kScaled<W>)
    if (weight.groups == 1) return scale_sums(weight, factors, panel, panels, sums, stride, row, rows);
  return reinterpret_cast<float*>(sums);
}

}  // namespace
}  // namespace ISA_NS
}  // namespace vllm_ms
