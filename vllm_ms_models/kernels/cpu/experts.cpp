// Mixture of experts: the gated products of each expert's rows, and their weighted sum.
//
// Rows are sorted by expert (a counting sort), so that each expert's weights are read once, and those that nobody chose
// not at all. An expert's rows are gathered, multiplied by the ordinary linear layers (gemm.cpp, gemm_integers.cpp: every
// kind of weight works, and all threads share each product), and added to float32 sums, which are rounded once at the
// end.
//
// One row of 8 experts reads 16 matrices one after the other; at 1 MB or more each, what a product costs beside memory
// (about 2 us) does not count.

#include "kernels.h"
#include "simd.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

constexpr long kBlockRows = 1024;  // of one expert at a time: bounds the memory for them
constexpr long kSlab = 64;         // columns

// Calls function(p) with `p` a null pointer to the type.
template <class Function>
static void typed(int dtype, const Function& function) {
  if (dtype == kFloat32) function(static_cast<const float*>(nullptr));
  else if (dtype == kBfloat16) function(static_cast<const Bf16*>(nullptr));
  else function(static_cast<const F16*>(nullptr));
}

// Memory of a call, cut from one buffer.
struct Memory {
  int32_t* starts;   // [experts + 1]: where each expert's choices begin
  int32_t* choices;  // [tokens * top_k]: numbers of choices (token * top_k + k), by expert
  float* sums;       // [tokens, features]
  char* rows;        // [block, features], of the activations' dtype
  char* gated;       // [block, intermediate], the same
  float* products;   // [block, features]
};

static bool allocate(const ExpertsCall& call, long block, long intermediate, Memory& to) {
  const long element = dtype_size(call.dtype), choices = call.tokens * call.top_k;
  const long sizes[] = {(call.experts + 1) * 4,
                        choices * 4,
                        call.dtype == kFloat32 ? 0 : call.tokens * call.features * 4,
                        block * call.features * element,
                        block * intermediate * element,
                        block * call.features * 4};
  char* parts[6];
  long total = 0;
  for (long size : sizes) total += ceil_div(size, 64) * 64;
  char* at = static_cast<char*>(scratch(Slot::kExperts, size_t(total)));
  if (!at) return false;
  for (int i = 0; i < 6; at += ceil_div(sizes[i], 64) * 64, ++i) parts[i] = at;
  to = {reinterpret_cast<int32_t*>(parts[0]), reinterpret_cast<int32_t*>(parts[1]),
        call.dtype == kFloat32 ? static_cast<float*>(call.out) : reinterpret_cast<float*>(parts[2]),
        parts[3], parts[4], reinterpret_cast<float*>(parts[5])};
  return true;
}

INLINE long expert_of(const ExpertsCall& call, long choice) {
  const long expert = call.ids[choice] - call.first_expert;
  return 0 <= expert && expert < call.experts ? expert : -1;
}

static void sort(const ExpertsCall& call, const Memory& memory) {
  const long choices = call.tokens * call.top_k;
  int32_t* starts = memory.starts;
  memset(starts, 0, size_t(call.experts + 1) * 4);
  for (long i = 0; i < choices; ++i)
    if (const long e = expert_of(call, i); e >= 0) ++starts[e];
  for (long e = 1; e <= call.experts; ++e) starts[e] += starts[e - 1];  // where expert e ends
  for (long i = choices - 1; i >= 0; --i)
    if (const long e = expert_of(call, i); e >= 0) memory.choices[--starts[e]] = int32_t(i);
}

template <class T>
static void begin_sums(const T* addend, float* sums, long count) {
  parallel_ranges(ceil_div(count, 1024), 1024 * 6, [&](long begin, long end) {
    const long first = begin * 1024, last = min(end * 1024, count);
    if (!addend) {
      memset(sums + first, 0, size_t(last - first) * 4);
      return;
    }
    long i = first;
    for (; i + VW <= last; i += VW) store(sums + i, load(addend + i));
    for (; i < last; ++i) sums[i] = load_one(addend + i);
  });
}

template <class T>
static void round_sums(const float* sums, T* out, long count) {
  parallel_ranges(ceil_div(count, 1024), 1024 * 6, [&](long begin, long end) {
    long i = begin * 1024;
    const long last = min(end * 1024, count);
    for (; i + VW <= last; i += VW) store(out + i, load(sums + i));
    for (; i < last; ++i) store_one(out + i, sums[i]);
  });
}

// The rows of `count` choices, one after another.
static const void* gather(const ExpertsCall& call, const int32_t* choices, long count, char* to) {
  const size_t bytes = size_t(call.features * dtype_size(call.dtype));
  const char* x = static_cast<const char*>(call.x);
  if (count == 1) return x + size_t(choices[0] / call.top_k) * bytes;
  parallel_ranges(count, long(bytes) * 2, [&](long begin, long end) {
    for (long i = begin; i < end; ++i) memcpy(to + size_t(i) * bytes, x + size_t(choices[i] / call.top_k) * bytes, bytes);
  });
  return to;
}

// sums of each choice's token += its share * its product. Threads have columns of their own, whatever the tokens are.
static void add(const ExpertsCall& call, const int32_t* choices, long count, const float* products, float* sums) {
  const long features = call.features;
  parallel_ranges(ceil_div(features, kSlab), count * kSlab * 12, [&](long begin, long end) {
    const long first = begin * kSlab, last = min(end * kSlab, features);
    for (long r = 0; r < count; ++r) {
      const float share = call.shares[choices[r]];
      const float* from = products + r * features;
      float* to = sums + choices[r] / call.top_k * features;
      long i = first;
      for (; i + VW <= last; i += VW) store(to + i, load(to + i) + share * load(from + i));
      for (; i < last; ++i) to[i] += share * from[i];
    }
  });
}

static const char* product(const Packed& weight, const void* x, int dtype, long rows, Gate gate, void* out,
                           int out_dtype, long stride) {
  LinearCall call;
  call.weight = &weight;
  call.x = x, call.x_dtype = dtype, call.rows = rows;
  call.bias = nullptr, call.gate = gate;
  call.out.data[0] = out, call.out.stride[0] = stride, call.out.dtype = out_dtype;
  return linear(call);
}

}  // namespace

const char* experts(const ExpertsCall& call) {
  const long count = call.tokens * call.features;
  long intermediate = 0;
  for (long e = 0; e < call.experts; ++e)
    if (call.gate_up[e]) intermediate = max(intermediate, call.gate_up[e]->size[0]);
  const long block = min(call.tokens * call.top_k, kBlockRows);
  Memory memory;
  if (!allocate(call, block, intermediate, memory)) return fail("Out of memory for %ld rows of experts.", call.tokens);
  typed(call.dtype, [&](auto* none) {
    begin_sums(static_cast<decltype(none)>(call.addend), memory.sums, count);
  });
  sort(call, memory);
  for (long e = 0; e < call.experts; ++e) {
    const long end = memory.starts[e + 1];
    for (long first = memory.starts[e]; first < end; first += block) {
      const long rows = min(block, end - first);
      const int32_t* choices = memory.choices + first;
      const void* x = gather(call, choices, rows, memory.rows);
      const Packed &gate_up = *call.gate_up[e], &down = *call.down[e];
      const char* message =
          product(gate_up, x, call.dtype, rows, call.gate, memory.gated, call.dtype, gate_up.size[0]);
      if (!message)
        message = product(down, memory.gated, call.dtype, rows, Gate::kNone, memory.products, kFloat32, call.features);
      if (message) return message;
      add(call, choices, rows, memory.products, memory.sums);
    }
  }
  if (call.dtype == kBfloat16) round_sums(memory.sums, static_cast<Bf16*>(call.out), count);
  else if (call.dtype == kFloat16) round_sums(memory.sums, static_cast<F16*>(call.out), count);
  return nullptr;
}

}  // namespace ISA_NS
}  // namespace vllm_ms
