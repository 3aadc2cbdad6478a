// Mixture of experts: the gated products of each expert's rows, and their weighted sum.
//
// Rows are sorted by expert (a counting sort), so that each expert's weights are read once, and those that nobody chose
// not at all. Then, for as many experts at a time as have kBlockRows rows together: their rows are gathered, multiplied
// by the ordinary linear layers (gemm.cpp, gemm_integers.cpp: any kind of weight works), and added to float32 sums,
// which are rounded once at the end. A token's experts are added in ascending order, whatever else is in the batch.
//
// Work split. An expert with kSharedRows rows is multiplied by all threads together. Of experts with fewer, the threads
// take slices of ~kSliceBytes of all their weights in turns: one row of 8 experts reads 16 matrices, and threads would
// wait for each other after each.

#include "kernels.h"
#include "simd.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

constexpr long kBlockRows = 1024;  // at a time: bounds the memory for them
constexpr long kSharedRows = 64;
constexpr long kSliceBytes = 256 * 1024;
constexpr long kSlicePanels = 8;  // of which slices are multiples
constexpr long kSlab = 64;        // columns

// Calls function(p) with `p` a null pointer to the type.
template <class Function>
static void typed(int dtype, const Function& function) {
  if (dtype == kFloat32) function(static_cast<const float*>(nullptr));
  else if (dtype == kBfloat16) function(static_cast<const Bf16*>(nullptr));
  else function(static_cast<const F16*>(nullptr));
}

// An expert that was chosen, and all or kBlockRows of its rows.
struct Active {
  int32_t expert;
  long first, rows;  // of the sorted choices
};

// Memory of a call, cut from one buffer.
struct Memory {
  int32_t* starts;   // [experts + 1]: where each expert's choices begin
  int32_t* choices;  // [tokens * top_k]: numbers of choices (token * top_k + k), by expert
  Active* active;    // [as many as there can be]
  float* sums;       // [tokens, features]
  char* rows;        // [block, features], of the activations' dtype
  char* gated;       // [block, intermediate], the same
  float* products;   // [block, features]
};

static bool allocate(const ExpertsCall& call, long block, long intermediate, Memory& to) {
  constexpr int kParts = 7;
  const long element = dtype_size(call.dtype), choices = call.tokens * call.top_k;
  const long sizes[kParts] = {(call.experts + 1) * 4,
                              choices * 4,
                              (min(call.experts, choices) + choices / block) * long(sizeof(Active)),
                              call.dtype == kFloat32 ? 0 : call.tokens * call.features * 4,
                              block * call.features * element,
                              block * intermediate * element,
                              block * call.features * 4};
  char* parts[kParts];
  long total = 0;
  for (long size : sizes) total += ceil_div(size, 64) * 64;
  char* at = static_cast<char*>(scratch(Slot::kExperts, size_t(total)));
  if (!at) return false;
  for (int i = 0; i < kParts; at += ceil_div(sizes[i], 64) * 64, ++i) parts[i] = at;
  to = {reinterpret_cast<int32_t*>(parts[0]), reinterpret_cast<int32_t*>(parts[1]),
        reinterpret_cast<Active*>(parts[2]),
        call.dtype == kFloat32 ? static_cast<float*>(call.out) : reinterpret_cast<float*>(parts[3]),
        parts[4], parts[5], reinterpret_cast<float*>(parts[6])};
  return true;
}

INLINE long expert_of(const ExpertsCall& call, long choice) {
  const long expert = call.ids[choice] - call.first_expert;
  return 0 <= expert && expert < call.experts ? expert : -1;
}

// Returns how many are active, those of more than `block` rows counted several times.
static long sort(const ExpertsCall& call, long block, const Memory& memory) {
  const long choices = call.tokens * call.top_k;
  int32_t* starts = memory.starts;
  memset(starts, 0, size_t(call.experts + 1) * 4);
  for (long i = 0; i < choices; ++i)
    if (const long e = expert_of(call, i); e >= 0) ++starts[e];
  for (long e = 1; e <= call.experts; ++e) starts[e] += starts[e - 1];  // where expert e ends
  for (long i = choices - 1; i >= 0; --i)
    if (const long e = expert_of(call, i); e >= 0) memory.choices[--starts[e]] = int32_t(i);
  long count = 0;
  for (long e = 0; e < call.experts; ++e)
    for (long first = starts[e]; first < starts[e + 1]; first += block)
      memory.active[count++] = {int32_t(e), first, min(block, starts[e + 1] - first)};
  return count;
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
static void gather(const ExpertsCall& call, const int32_t* choices, long count, char* to) {
  const size_t bytes = size_t(call.features * dtype_size(call.dtype));
  const char* x = static_cast<const char*>(call.x);
  parallel_ranges(count, long(bytes) * 2, [&](long begin, long end) {
    for (long i = begin; i < end; ++i)
      memcpy(to + size_t(i) * bytes, x + size_t(choices[i] / call.top_k) * bytes, bytes);
  });
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

// Panels [first, first + count) of a weight; of two parts whose panels take turns, pairs of them.
static Packed slice(const Packed& weight, long first, long count) {
  Packed part = weight;
  const long row = first / weight.panel_step * 16;
  part.data = static_cast<char*>(weight.data) + first * weight.panel_bytes;
  part.panels = count;
  part.out_features = 0;
  for (int i = 0; i < weight.parts; ++i) {
    part.size[i] = min(count / weight.panel_step * 16, weight.size[i] - row);
    part.first_row[i] = weight.first_row[i] + row;  // of the bias, which is not cut
    part.out_features += part.size[i];
  }
  if (weight.scales) part.scales += first * weight.groups * 16;
  if (weight.zeros) part.zeros += first * weight.groups * 16;
  if (weight.addends) part.addends += first * 16;
  return part;
}

// One of an expert's products: `from` [rows, inputs] -> `to` [rows, outputs] of `dtype`.
struct Product {
  const Packed* const* weights;
  const char* from;
  int from_dtype;
  Gate gate;
  char* to;
  int dtype;
  long outputs, offset;  // row number 0 of both is that of choice `offset`
  const float* bias;     // [experts, out_features] or null
};

// Of one expert; by the calling thread alone if only panels [first, first + count).
static const char* multiply(const Product& product, const Active& active, long first, long count) {
  const Packed& weight = *product.weights[active.expert];
  const long row = active.first - product.offset, column = first / weight.panel_step * 16;
  const Packed part = count < weight.panels ? slice(weight, first, count) : weight;
  LinearCall call;
  call.weight = &part, call.gate = product.gate;
  call.bias = product.bias ? product.bias + active.expert * weight.out_features : nullptr;
  call.x = product.from + row * weight.in_features * dtype_size(product.from_dtype);
  call.x_dtype = product.from_dtype, call.rows = active.rows;
  call.out.data[0] = product.to + (row * product.outputs + column) * dtype_size(product.dtype);
  call.out.stride[0] = product.outputs, call.out.dtype = product.dtype;
  return linear(call);
}

// Of `count` experts of one shape.
static const char* multiply_all(const Product& product, const Active* active, long count) {
  const Packed& shape = *product.weights[active->expert];
  const long wanted = kSliceBytes / max(1, shape.panel_bytes) / kSlicePanels * kSlicePanels;
  const long size = max(kSlicePanels, wanted), slices = ceil_div(shape.panels, size);
  const char* message = nullptr;
  for (long i = 0; i < count && !message; ++i)
    if (active[i].rows >= kSharedRows) message = multiply(product, active[i], 0, shape.panels);
  if (message) return message;
  parallel(count * slices, [&](long task, int) {
    const Active& one = active[task / slices];
    const long first = task % slices * size;
    if (one.rows >= kSharedRows) return;
    if (const char* failure = multiply(product, one, first, min(size, shape.panels - first)))
      __atomic_store_n(&message, failure, __ATOMIC_RELAXED);
  });
  return message;
}

}  // namespace

const char* experts(const ExpertsCall& call) {
  const long count = call.tokens * call.features, block = min(max(1, call.tokens * call.top_k), kBlockRows);
  long intermediate = 0;
  for (long e = 0; e < call.experts; ++e)
    if (call.gate_up[e]) intermediate = max(intermediate, call.gate_up[e]->size[0]);
  Memory memory;
  if (!allocate(call, block, intermediate, memory)) return fail("Out of memory for %ld rows of experts.", call.tokens);
  typed(call.dtype, [&](auto* none) {
    begin_sums(static_cast<decltype(none)>(call.addend), memory.sums, count);
  });
  const long actives = sort(call, block, memory);
  for (long begin = 0, end = 0; begin < actives; begin = end) {
    const Active* active = memory.active + begin;
    long rows = 0;
    while (end < actives && rows + memory.active[end].rows <= block) rows += memory.active[end++].rows;
    gather(call, memory.choices + active->first, rows, memory.rows);
    const Product gate_up = {call.gate_up, memory.rows,  call.dtype,   call.gate,
                             memory.gated, call.dtype, intermediate, active->first, call.gate_up_bias};
    const Product down = {call.down, memory.gated, call.dtype, Gate::kNone, reinterpret_cast<char*>(memory.products),
                          kFloat32,  call.features, active->first, call.down_bias};
    const char* message = multiply_all(gate_up, active, end - begin);
    if (!message) message = multiply_all(down, active, end - begin);
    if (message) return message;
    add(call, memory.choices + active->first, rows, memory.products, memory.sums);
  }
  if (call.dtype == kBfloat16) round_sums(memory.sums, static_cast<Bf16*>(call.out), count);
  else if (call.dtype == kFloat16) round_sums(memory.sums, static_cast<F16*>(call.out), count);
  return nullptr;
}

}  // namespace ISA_NS
}  // namespace vllm_ms
