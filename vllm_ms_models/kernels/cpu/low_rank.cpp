// Low-rank adapters (LoRA): to each row of a product, up * (scale * down * x) of that row's adapter is added, in float32
// and before the product is activated and rounded. LowRank in low_rank.py says what the matrices are.
//
// `reduce` is the first half. Rows are sorted by adapter (a counting sort), so that each adapter's matrices are read
// once, and multiplied by the ordinary linear layer: adapters with few rows by one thread each, others by all threads
// one after another. Results go back to where their rows are.
//
// `add_low_rank` is the second half, called by the loops of gemm.h while a tile's sums are in L1: it goes on adding
// to them, rank by rank, with the same micro-kernel. 16 columns of `up` are 512 bytes at rank 16 in bf16, those of a dozen
// adapters stay in L1 for all rows. So nothing is stored and read again, a gate and its factor get their summands
// before they meet, and a row without an adapter has the very bits that it has in a batch without adapters. Neighbouring
// rows of one adapter are multiplied together; a row's sums are the same whoever its neighbours are (tile.h).

#include "gemm.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

constexpr long kSharedRows = 64;  // of an adapter, from which on all threads multiply together

// Memory of a call, cut from one buffer.
struct Sorted {
  int32_t* starts;  // [count + 1]: where each adapter's rows begin in `order`
  int32_t* order;   // [tokens]: numbers of rows, by adapter
  char* x;          // [tokens, features]: these rows
  float* sums;      // [tokens, parts * width]
};

static bool allocate(const ReduceCall& call, Sorted& to) {
  const long sizes[] = {(call.count + 1) * 4, call.tokens * 4, call.tokens * call.features * dtype_size(call.x_dtype),
                        call.tokens * call.parts * call.width * 4};
  char* parts[4];
  long total = 0;
  for (long size : sizes) total += ceil_div(size, 64) * 64;
  char* at = static_cast<char*>(scratch(Slot::kLowRank, size_t(total)));
  if (!at) return false;
  for (int i = 0; i < 4; at += ceil_div(sizes[i], 64) * 64, ++i) parts[i] = at;
  to = {reinterpret_cast<int32_t*>(parts[0]), reinterpret_cast<int32_t*>(parts[1]), parts[2],
        reinterpret_cast<float*>(parts[3])};
  return true;
}

// Fills `starts` and `order`, rows of one adapter in ascending order.
static void sort(const ReduceCall& call, const Sorted& to) {
  memset(to.starts, 0, size_t(call.count + 1) * 4);
  for (long row = 0; row < call.tokens; ++row)
    if (call.rows[row] >= 0) ++to.starts[call.rows[row]];
  for (long a = 1; a <= call.count; ++a) to.starts[a] += to.starts[a - 1];  // where adapter a ends
  for (long row = call.tokens - 1; row >= 0; --row)
    if (call.rows[row] >= 0) to.order[--to.starts[call.rows[row]]] = int32_t(row);
}

// The products of one adapter's rows.
static const char* multiply(const ReduceCall& call, const Sorted& sorted, long adapter) {
  const long first = sorted.starts[adapter], rows = sorted.starts[adapter + 1] - first;
  const Packed* down = call.adapters[adapter].down;
  if (!down || rows == 0) return nullptr;
  const int32_t* order = sorted.order + first;
  const size_t bytes = size_t(call.features * dtype_size(call.x_dtype));
  const char* x = static_cast<const char*>(call.x) + size_t(order[0]) * bytes;
  if (order[rows - 1] - order[0] != rows - 1) {  // not side by side
    char* to = sorted.x + size_t(first) * bytes;
    parallel_ranges(rows, long(bytes) * 2, [&](long begin, long end) {
      for (long i = begin; i < end; ++i)
        memcpy(to + size_t(i) * bytes, static_cast<const char*>(call.x) + size_t(order[i]) * bytes, bytes);
    });
    x = to;
  }
  LinearCall product = {};
  product.weight = down, product.x = x, product.x_dtype = call.x_dtype, product.rows = rows, product.gate = Gate::kNone;
  product.out.dtype = kFloat32;
  for (long part = 0; part < call.parts; ++part) {
    product.out.data[part] = sorted.sums + (first * call.parts + part) * call.width;
    product.out.stride[part] = call.parts * call.width;
  }
  return linear(product);
}

// Scaled sums of all rows to their places; zeros elsewhere.
static void scatter(const ReduceCall& call, const Sorted& sorted) {
  const long stride = call.parts * call.width;
  memset(call.out, 0, size_t(call.tokens * stride) * 4);
  for (long adapter = 0; adapter < call.count; ++adapter) {
    const LowRank& matrices = call.adapters[adapter];
    if (!matrices.down) continue;
    for (long i = sorted.starts[adapter]; i < sorted.starts[adapter + 1]; ++i)
      for (long part = 0; part < call.parts; ++part) {
        const float* from = sorted.sums + i * stride + part * call.width;
        float* to = call.out + sorted.order[i] * stride + part * call.width;
        for (long j = 0; j < matrices.down->size[part]; ++j) to[j] = matrices.scales[part] * from[j];
      }
  }
}

// sums[r][0:16] += up * reduced of so many rows of one adapter, for one panel.
template <class W>
static void add_rows(const Packed& up, long panel, const float* reduced, long stride, long rank, float* sums,
                     long sums_stride, long rows) {
  const char* w = static_cast<const char*>(up.data) + panel * up.panel_bytes;
  for (long r = 0; r < rows; r += kRows)
    find_tile<W>(int(min(kRows, rows - r)), 1)(reduced + r * stride, stride, w, W::kStepBytes, 0,
                                               ceil_div(rank, W::kDepth), sums + r * sums_stride, sums_stride, true,
                                               {nullptr, 0, 0, 0, nullptr});
}

}  // namespace

const char* reduce(const ReduceCall& call) {
  for (long row = 0; row < call.tokens; ++row)
    if (call.rows[row] >= call.count)
      return fail("Row %ld has adapter %d; there are %ld.", row, call.rows[row], call.count);
  Sorted sorted;
  if (!allocate(call, sorted)) return fail("Out of memory for %ld rows of adapters.", call.tokens);
  sort(call, sorted);
  const auto many = [&](long adapter) { return sorted.starts[adapter + 1] - sorted.starts[adapter] >= kSharedRows; };
  const char* message = nullptr;
  for (long adapter = 0; adapter < call.count && !message; ++adapter)
    if (many(adapter)) message = multiply(call, sorted, adapter);
  if (message) return message;
  parallel(call.count, [&](long adapter, int) {
    if (many(adapter)) return;
    if (const char* failure = multiply(call, sorted, adapter)) __atomic_store_n(&message, failure, __ATOMIC_RELAXED);
  });
  if (message) return message;
  scatter(call, sorted);
  return nullptr;
}

void add_low_rank(const LinearCall& call, long panel, long panels, float* sums, long stride, long first_row, long rows) {
  const AddendCall& addend = *call.addend;
  const long reduced_stride = call.weight->parts * addend.width;
  for (long begin = 0, end; begin < rows; begin = end) {
    const int32_t number = addend.rows[first_row + begin];
    for (end = begin + 1; end < rows && addend.rows[first_row + end] == number; ++end) continue;
    if (number < 0 || number >= addend.count || !addend.adapters[number].up) continue;
    const LowRank& adapter = addend.adapters[number];
    for (long p = 0; p < panels; ++p) {
      const int part = part_of(*call.weight, panel + p);
      const long rank = adapter.down->size[part];
      if (rank == 0) continue;
      const float* reduced = addend.reduced + (first_row + begin) * reduced_stride + part * addend.width;
      float* to = sums + begin * stride + p * 16;
      const auto add = adapter.up->dtype == kFloat32    ? add_rows<Float>
                       : adapter.up->dtype == kBfloat16 ? add_rows<Pairs>
                                                        : add_rows<Half>;
      add(*adapter.up, panel + p, reduced, reduced_stride, rank, to, stride, end - begin);
    }
  }
}

}  // namespace ISA_NS
}  // namespace vllm_ms
