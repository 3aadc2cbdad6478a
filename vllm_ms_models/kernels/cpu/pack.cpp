// Into and out of the panel layout (gemm.cpp describes it): loading a weight, looking up embeddings.
//
// Loading writes each row of the checkpoint straight to its final place, so no second copy of a model ever exists. A
// row becomes one lane of a panel: its values land 64 bytes apart (32 for float16). To keep these scattered stores in
// L1, a panel's 16 rows are interleaved in blocks of kBlock inputs (a 32 KB window of the panel); the source is read in
// runs of kBlock values per row, front to back, which is also what a memory-mapped file wants. Panels are spread over
// the threads. Throughput is about one pair of bf16 per cycle and core: ten times what a disk delivers.
//
// An embedding row is gathered back from its lane: ceil(k/2) reads 64 bytes apart, requested ahead. That costs about a
// microsecond a token more than a plain row would, and saves the second copy of a matrix whose transpose is the output
// layer (tied weights).

#include "kernels.h"
#include "simd.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

constexpr long kBlock = 512;
constexpr long kAhead = 2048;  // bytes; the processor's own prefetching starts anew in each page

struct PackCall {
  char* panel;  // first panel touched
  long panel_stride;
  long first_lane;  // lane of the first row in that panel
  const void* source;
  long rows, stride, in_features;
};

INLINE bool same(const float*, const float*) { return true; }
INLINE bool same(const Bf16*, const Bf16*) { return true; }
INLINE bool same(const F16*, const F16*) { return true; }
template <class A, class B>
INLINE bool same(const A*, const B*) {
  return false;
}

// Converts `count` values.
template <class From, class To>
static void convert(const From* from, To* to, long count) {
  long i = 0;
  for (; i + VW <= count; i += VW) store(to + i, load(from + i));
  if (i < count) store_some(to + i, load_some(from + i, count - i), count - i);
}

// `count` values beginning at input `k` (even) into a lane.
static void scatter(const float* values, char* lane, long k, long count) {
  float* to = reinterpret_cast<float*>(lane) + k * 16;
  for (long i = 0; i < count; ++i) to[i * 16] = values[i];
}
static void scatter(const F16* values, char* lane, long k, long count) {
  F16* to = reinterpret_cast<F16*>(lane) + k * 16;
  for (long i = 0; i < count; ++i) to[i * 16] = values[i];
}
static void scatter(const Bf16* values, char* lane, long k, long count) {
  char* to = lane + k / 2 * 64;
  for (long i = 0; i + 1 < count; i += 2) memcpy(to + i * 32, values + i, 4);
  if (count % 2) memcpy(to + (count - 1) * 32, values + count - 1, 2);
}
INLINE long lane_bytes(const float*) { return 4; }
INLINE long lane_bytes(const F16*) { return 2; }
INLINE long lane_bytes(const Bf16*) { return 4; }  // a pair

template <class From, class To>
static void pack_panel(const PackCall& call, long index) {
  long first = max(index * 16 - call.first_lane, 0), last = min((index + 1) * 16 - call.first_lane, call.rows);
  char* panel = call.panel + index * call.panel_stride;
  for (long k = 0; k < call.in_features; k += kBlock) {
    long count = min(kBlock, call.in_features - k);
    for (long row = first; row < last; ++row) {
      const From* from = static_cast<const From*>(call.source) + row * call.stride + k;
      To* none = nullptr;
      char* lane = panel + (row + call.first_lane) % 16 * lane_bytes(none);
      if (same(from, static_cast<const To*>(none))) {
        scatter(reinterpret_cast<const To*>(from), lane, k, count);
        continue;
      }
      To values[kBlock];
      convert(from, values, count);
      scatter(values, lane, k, count);
    }
  }
}

template <class To>
static void pack(const PackCall& call, int dtype) {
  long panels = ceil_div(call.first_lane + call.rows, 16);
  parallel(panels, [&](long index, int) {
    if (dtype == kFloat32) pack_panel<float, To>(call, index);
    else if (dtype == kBfloat16) pack_panel<Bf16, To>(call, index);
    else pack_panel<F16, To>(call, index);
  });
}

// One row of the matrix out of its lane.
static void gather(const Packed& weight, long row, char* out) {
  int part = weight.parts - 1;
  while (weight.first_row[part] > row) --part;
  row -= weight.first_row[part];
  const char* panel =
      static_cast<const char*>(weight.data) + panel_of(weight, part, row) * weight.panel_bytes;
  const long k = weight.in_features, lane = row % 16;
  if (weight.dtype == kFloat32) {
    for (long i = 0; i < k; ++i) memcpy(out + i * 4, panel + (i * 16 + lane) * 4, 4);
  } else if (weight.dtype == kFloat16) {
    for (long i = 0; i < k; ++i) memcpy(out + i * 2, panel + (i * 16 + lane) * 2, 2);
  } else {
    for (long i = 0; i + 1 < k; i += 2) {
      __builtin_prefetch(panel + i * 32 + kAhead);
      memcpy(out + i * 2, panel + i * 32 + lane * 4, 4);
    }
    if (k % 2) memcpy(out + (k - 1) * 2, panel + (k - 1) * 32 + lane * 4, 2);
  }
}

}  // namespace

const char* pack_rows(const Packed& weight, int part, long first_row, const void* source, int dtype, long rows,
                      long stride) {
  if (rows <= 0 || weight.in_features == 0) return nullptr;
  PackCall call;
  call.panel = static_cast<char*>(weight.data) + panel_of(weight, part, first_row) * weight.panel_bytes;
  call.panel_stride = weight.panel_step * weight.panel_bytes;
  call.first_lane = first_row % 16;
  call.source = source;
  call.rows = rows;
  call.stride = stride;
  call.in_features = weight.in_features;
  if (weight.dtype == kFloat32) pack<float>(call, dtype);
  else if (weight.dtype == kBfloat16) pack<Bf16>(call, dtype);
  else pack<F16>(call, dtype);
  return nullptr;
}

const char* embedding(const Packed& weight, const void* ids, bool wide, long count, long first_row, void* out) {
  const long row_bytes = weight.in_features * dtype_size(weight.dtype);
  parallel_ranges(count, weight.in_features * 32, [&](long begin, long end) {
    for (long i = begin; i < end; ++i) {
      long row = (wide ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i]) - first_row;
      char* to = static_cast<char*>(out) + i * row_bytes;
      if (row < 0 || row >= weight.out_features) memset(to, 0, size_t(row_bytes));
      else gather(weight, row, to);
    }
  });
  return nullptr;
}

}  // namespace ISA_NS
}  // namespace vllm_ms
