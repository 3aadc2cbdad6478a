// The loops of all linear layers: out = x * weight^T + bias, for one row, a few rows and many rows from one packed copy of
// the weight. gemm.cpp and gemm_integers.cpp say how weights are stored, and instantiate them.
//
// Loop order. Panels are taken in groups (what is stored together: one micro-kernel call, or two if gate and up are
// joined). A task is a range of groups and a piece of the rows:
//
//     for group in task:                      weights: P panels, P * 32 K bytes in bf16, stay in L2 (1 MB) for all rows
//       for block of rows:                    one micro-kernel call each: x streams from L2, 4 bytes a row and step
//         accumulate over K in registers      -> float32 buffer in L1
//         (add what adapters do,) add bias, (activate, multiply,) round, store
//
// One row of weights is read from memory once per task, whatever the number of rows. If a group exceeds kCacheBytes
// (K > 3400 for bf16), K is cut into blocks, and the float32 sums of kRowBlocks micro-kernel heights of rows are kept
// in a buffer between them. Numbers: the bf16 micro-kernel does 24 dot products per 3 x 64 bytes of weights, so it
// needs 8 bytes per cycle from L2 (which gives 32), and 1/16 line per row and step of x.
//
// Reading ahead. With 8 to 64 rows memory and multipliers take about as long as each other (a core multiplies 12 rows
// in the time it takes to read one line), so the micro-kernel requests the lines of the next block, or of the group
// that this thread will take next, spread evenly over its calls: two blocks fit L2. 16 rows gain 10 to 15%, 32 rows 6
// to 8%, 128 rows 2%. Up to 8 rows a group larger than kCacheBytes is used once and requested kAheadBytes ahead
// instead; one or two rows always read so.
//
// gate|up. `linear_gated` never stores gate and up: a group holds pairs of their panels, and the float32 sums are
// activated, multiplied and rounded once on their way out. Against two stored matrices and a pass over them this saves
// 10% of both at 1024 rows, and the memory.
//
// Work split. Few rows: tasks of ~kTaskBytes of consecutive weights, claimed in order by all threads, so that both
// cores stream through neighbouring memory. Many rows: the rows are cut too, until there are about 16 tasks per thread
// (the last task then costs at most a few percent of idle time) and a piece fits L2 beside the weights, if that leaves
// at least kLeastRows rows to share them. All groups of a piece come before the next piece.
#pragma once

#include "gemm_scales.h"
#include "kernels.h"
#include "tile.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

constexpr long kCacheBytes = 320 * 1024, kAheadBytes = 1024;
constexpr long kRowBytes = 448 * 1024, kLeastRows = 192;
constexpr long kTaskBytes = 128 * 1024;
constexpr long kSmallBytes = 64 * 1024;  // weights below this are not worth a second thread for a few rows
constexpr long kActivationBytes = 16 << 20;  // converted at a time
constexpr long kRowBlocks = 16;
constexpr long kSplitRows = 64;

// Where one panel's results go.
struct Target {
  char* data;
  long stride;  // elements
  long count;   // <= 16
  const float* bias;
};

INLINE Target target_of(const LinearCall& call, long panel, long element) {
  const Packed& weight = *call.weight;
  const int part = part_of(weight, panel);
  long row = (panel - weight.first_panel[part]) / weight.panel_step * 16;
  return {static_cast<char*>(call.out.data[part]) + row * element, call.out.stride[part],
          min(16, weight.size[part] - row), call.bias ? call.bias + weight.first_row[part] + row : nullptr};
}

template <class T>
static void store_panel(const Target& target, const float* sums, long sums_stride, long first_row, long rows) {
  float bias[16] = {};
  if (target.bias) memcpy(bias, target.bias, size_t(target.count) * sizeof(float));
  T* out = reinterpret_cast<T*>(target.data) + first_row * target.stride;
  for (long r = 0; r < rows; ++r, out += target.stride, sums += sums_stride) {
    if (target.count == 16) {
      UNROLL for (int i = 0; i < 16; i += VW)
        store(out + i, load(sums + i) + load(bias + i));
      continue;
    }
    T values[16];
    UNROLL for (int i = 0; i < 16; i += VW)
      store(values + i, load(sums + i) + load(bias + i));
    memcpy(out, values, size_t(target.count) * sizeof(T));
  }
}

INLINE vf activate(vf x, Gate gate) {
  return gate == Gate::kSilu ? silu(x) : gate == Gate::kGeluErf ? gelu_erf(x) : gelu_tanh(x);
}

// Of gpt-oss: gate * sigmoid(1.702 gate) * (up + 1), with gate <= 7 and -7 <= up <= 7. NaN stays NaN.
INLINE vf clamped_product(vf gate, vf up) {
  const vf limit = splat(7.0f);
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return gate / (1.0f + exponential(-1.702f * gate)) * (up + 1.0f);
}

// activation(gate) * up, in float32, into the panel of `gate`.
static void apply_gate(const LinearCall& call, long panel, long rows, float* sums, long stride) {
  const long row = panel / 2 * 16, count = min(16, call.weight->size[0] - row);
  float bias[2][16] = {};
  for (int part = 0; call.bias && part < 2; ++part)
    memcpy(bias[part], call.bias + call.weight->first_row[part] + row, size_t(count) * sizeof(float));
  for (long r = 0; r < rows; ++r, sums += stride)
    UNROLL for (int i = 0; i < 16; i += VW) {
      const vf x = load(sums + i) + load(bias[0] + i), up = load(sums + 16 + i) + load(bias[1] + i);
      store(sums + i, call.gate == Gate::kClamped ? clamped_product(x, up) : activate(x, call.gate) * up);
    }
}

static void store_group(const LinearCall& call, long panel, long panels, float* sums, long stride, long first_row,
                        long rows) {
  const bool gated = call.gate != Gate::kNone;
  if (call.addend) add_low_rank(call, panel, panels, sums, stride, first_row, rows);
  for (long p = 0; p < panels; p += gated ? 2 : 1) {
    Target target = target_of(call, panel + p, dtype_size(call.out.dtype));
    if (gated) {
      apply_gate(call, panel + p, rows, sums + 16 * p, stride);
      target.bias = nullptr;
    }
    if (call.out.dtype == kFloat32) store_panel<float>(target, sums + 16 * p, stride, first_row, rows);
    else if (call.out.dtype == kBfloat16) store_panel<Bf16>(target, sums + 16 * p, stride, first_row, rows);
    else store_panel<F16>(target, sums + 16 * p, stride, first_row, rows);
  }
}

// Rows [first_row, first_row + rows) of a call, in the form that W multiplies.
template <class W>
struct Job {
  const LinearCall& call;
  const typename W::X* x;
  long stride;  // elements of x from row to row
  long first_row, rows;
  Factors factors;  // of small integers

  // Row `row` for a panel: parts may have inputs of their own, then panels come one by one.
  const typename W::X* row_for(long panel, long row) const {
    const long input = factors.inputs > 1 ? part_of(*call.weight, panel) : 0;
    return x + (input * rows + row - first_row) * stride;
  }
};

// Sums of one micro-kernel call: steps [step, step + steps) of panels [panel, panel + width) for `height` rows.
template <class W>
static void multiply_tile(const Job<W>& job, long panel, int width, long row, long height, long step, long steps,
                          Sum<W>* sums, long stride, bool accumulate, Ahead ahead) {
  const Packed& weight = *job.call.weight;
  const Tile<W> tile = find_tile<W>(int(height), width);
  const typename W::X* x = job.row_for(panel, row) + step * W::kSubsteps;
  const char* w = static_cast<const char*>(weight.data) + panel * weight.panel_bytes + step * W::kStepBytes;
  if constexpr (kScaled<W> && !kRounded<W>)
    if (weight.groups > 1) {
      alignas(64) float part[kTileSums];
      const long group_steps = weight.group_size / W::kDepth, end = step + steps;
      const char* data = static_cast<const char*>(weight.data);
      const long next = ahead.then ? (ahead.then - data) / weight.panel_bytes : panel + width;
      for (const char* then = ahead.then; step < end; step += group_steps) {
        ahead.then = step + group_steps < end ? nullptr : then;
        tile(x, job.stride, w, W::kStepBytes, weight.panel_bytes, min(group_steps, end - step), part, width * 16,
             false, ahead);
        add_group(weight, job.factors, panel, width, step / group_steps, part, row - job.first_row, height, sums,
                  stride, accumulate, next);
        accumulate = true;
        ahead.at += group_steps * ahead.move, x += group_steps * W::kSubsteps, w += group_steps * W::kStepBytes;
      }
      return;
    }
  tile(x, job.stride, w, W::kStepBytes, weight.panel_bytes, steps, sums, stride, accumulate, ahead);
}

// `panels` (<= kMaxPanels) panels, `width` at a time, for rows [begin, end); `next` is the panels that this thread will
// want next, or null.
template <class W>
static void multiply_group(const Job<W>& job, long panel, int panels, int width, long begin, long end,
                           const char* next) {
  const Packed& weight = *job.call.weight;
  const long steps = ceil_div(weight.in_features, W::kDepth), height = tile_rows(end - begin);
  const long bytes = panels * weight.panel_bytes, wide = panels / width;  // micro-kernel calls side by side
  const bool reused = (end - begin > height) || wide > 1;
  const long blocks = reused ? max(1, ceil_div(bytes, kCacheBytes)) : 1;
  const long unit = weight.groups > 1 ? weight.group_size / W::kDepth : 1;  // steps that stay together
  const long block_steps = max(1, ceil_div(ceil_div(steps, blocks), unit) * unit), block_rows = height * kRowBlocks;
  const char* data = static_cast<const char*>(weight.data) + panel * weight.panel_bytes;
  const char* then = next;
  if (!reused && bytes > kCacheBytes) next = data + kAheadBytes;
  alignas(64) Sum<W> sums[kRows * kRowBlocks * kMaxPanels * 16];
  const long stride = panels * 16;
  for (long row = begin; row < end; row += block_rows) {
    const long rows = min(block_rows, end - row), tiles = ceil_div(rows, height) * wide;
    for (long step = 0; step < max(steps, 1); step += block_steps) {
      const char* after = step + block_steps < steps ? data + (step + block_steps) * W::kStepBytes : next;
      for (long tile = 0; tile < tiles; ++tile) {
        const long r = tile / wide * height, p = tile % wide * width;
        const long fetched = tile * panels / tiles, fetch = (tile + 1) * panels / tiles - fetched;
        multiply_tile<W>(
            job, panel + p, width, row + r, min(height, rows - r), step, min(block_steps, steps - step),
            sums + r * stride + p * 16, stride, step > 0,
            {after + fetched * weight.panel_bytes, after ? int(fetch) : 0, weight.panel_bytes, W::kStepBytes,
             reused ? nullptr : then});
      }
    }
    float* finished = finish<W>(weight, job.factors, panel, panels, sums, stride, row - job.first_row, rows);
    store_group(job.call, panel, panels, finished, stride, row, rows);
  }
}

// How the work of a call is cut up.
struct Split {
  int unit, tile_width, width;  // panels: stored together, of a micro-kernel call, of a group
  long groups, group_bytes;
  long row_pieces;  // of the rows
  long per_task;    // groups of a task
};

INLINE Split split_work(const LinearCall& call, long rows, long row_bytes) {
  const Packed& weight = *call.weight;
  const long threads = thread_count();
  const bool few = rows <= kFewRows && weight.panels >= 8 * kFewPanels * threads;  // enough groups for all threads
  Split s;
  s.unit = call.gate == Gate::kNone ? 1 : 2;
  s.tile_width = few ? kFewPanels : kPanels;
  s.width = few ? kFewPanels : s.unit * kPanels;
  s.groups = ceil_div(weight.panels, s.width);
  s.group_bytes = max(1, s.width * weight.panel_bytes);
  const long for_cache = min(rows / kLeastRows, rows * row_bytes / kRowBytes);
  s.row_pieces = max(1, min(rows / kSplitRows, max(ceil_div(16 * threads, s.groups), for_cache)));
  const bool many = s.row_pieces > 1 || rows > 4 * kRows;
  s.per_task = many ? 1 : max(1, min(kTaskBytes / s.group_bytes, s.groups / (8 * threads)));
  if (s.groups * s.group_bytes * ceil_div(rows, 4) < kSmallBytes) s.per_task = s.groups;
  return s;
}

template <class W>
static void multiply_rows(const Job<W>& job) {
  const Packed& weight = *job.call.weight;
  const long rows = job.rows;
  Split s = split_work(job.call, rows, job.stride * long(sizeof(*job.x)));
  if (job.factors.inputs > 1) s.tile_width = 1;
  const long tasks = ceil_div(s.groups, s.per_task), to_next_task = 1 + (thread_count() - 1) * s.per_task;
  parallel(tasks * s.row_pieces, [&](long task, int) {
    const long piece = task / tasks, first = task % tasks * s.per_task, last = min(first + s.per_task, s.groups);
    const long begin = job.first_row + rows * piece / s.row_pieces;
    const long end = job.first_row + rows * (piece + 1) / s.row_pieces;
    for (long group = first; group < last; ++group) {
      long panel = group * s.width, left = min(s.width, weight.panels - panel);
      const long next = group + (group + 1 < last ? 1 : to_next_task);  // the other threads take the tasks between
      const char* ahead = next < s.groups ? static_cast<const char*>(weight.data) + next * s.group_bytes : nullptr;
      if (left == s.width)
        multiply_group<W>(job, panel, s.width, s.tile_width, begin, end, ahead);
      else
        for (; left > 0; left -= s.unit, panel += s.unit)
          multiply_group<W>(job, panel, s.unit, 1, begin, end, nullptr);
    }
  });
}

// Rows of `count` values to rows of `stride` >= count values of type To, padded with zeros.
template <class From>
static void widen_rows(const From* from, float* to, long rows, long count, long stride) {
  parallel_ranges(rows, stride * 8, [&](long begin, long end) {
    for (long row = begin; row < end; ++row) {
      const From* in = from + row * count;
      float* out = to + row * stride;
      long i = 0;
      for (; i + VW <= count; i += VW) store(out + i, load(in + i));
      for (; i < stride; ++i) out[i] = i < count ? load_one(in + i) : 0.0f;
    }
  });
}

// Multiplies with float32 activations, converting them (a bounded number of rows at a time) if necessary.
template <class W>
static const char* multiply_float(const LinearCall& call, Factors factors = {}) {
  const long k = call.weight->in_features, stride = ceil_div(k, W::kDepth) * W::kDepth;
  if (call.x_dtype == kFloat32 && stride == k) {
    multiply_rows<W>({call, static_cast<const float*>(call.x), k, 0, call.rows, factors});
    return nullptr;
  }
  const long block = min(call.rows, max(kRows * kRowBlocks, kActivationBytes / max(stride * 4, 1)));
  float* x = static_cast<float*>(scratch(Slot::kActivations, size_t(block * stride) * sizeof(float)));
  if (!x) return fail("Out of memory for %ld activations.", block * stride);
  for (long row = 0; row < call.rows; row += block) {
    const long rows = min(block, call.rows - row);
    const char* from = static_cast<const char*>(call.x) + row * k * dtype_size(call.x_dtype);
    if (call.x_dtype == kFloat32) widen_rows(reinterpret_cast<const float*>(from), x, rows, k, stride);
    else if (call.x_dtype == kBfloat16) widen_rows(reinterpret_cast<const Bf16*>(from), x, rows, k, stride);
    else widen_rows(reinterpret_cast<const F16*>(from), x, rows, k, stride);
    multiply_rows<W>({call, x, stride, row, rows, factors.from_row(row)});
  }
  return nullptr;
}

#if defined(__AVX512BF16__)
// Multiplies with pairs of bf16.
template <class W>
static const char* multiply_dots(const LinearCall& call, Factors factors = {}) {
  const long k = call.weight->in_features, pairs = ceil_div(k, W::kDepth) * W::kSubsteps;
  const uint32_t* x = static_cast<const uint32_t*>(call.x);
  if (k % W::kDepth) {  // a row would end in the first values of the next, and 0 * NaN is not 0
    uint32_t* padded = static_cast<uint32_t*>(scratch(Slot::kActivations, size_t(call.rows * pairs) * 4));
    if (!padded) return fail("Out of memory for %ld activations.", call.rows * k);
    for (long row = 0; row < call.rows; ++row) {
      memset(padded + row * pairs + k / 2, 0, size_t(pairs - k / 2) * 4);
      memcpy(padded + row * pairs, static_cast<const char*>(call.x) + row * k * 2, size_t(k) * 2);
    }
    x = padded;
  }
  multiply_rows<W>({call, x, pairs, 0, call.rows, factors});
  return nullptr;
}
#endif

}  // namespace
}  // namespace ISA_NS
}  // namespace vllm_ms
