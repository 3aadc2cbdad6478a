// Norms, gated activations, rotary embedding: everything that touches each value once or twice.
//
// These kernels are limited by memory (many rows) or by their own call overhead (one row: 896 values take 0.1 us). So
// they read and write each value once per pass, compute in float32 whatever the storage type, round once, and use a
// second core only above ~64 KB of traffic (`parallel_ranges`): waking it costs as much as 32 KB of work.
//
// * rms_norm: the sum of squares runs in four vector accumulators (FMA latency 4), then one pass scales. A row stays in
//   L1 between the passes. add_rms_norm rounds x + residual to the storage type in the first pass and normalises the
//   *rounded* value, because that is what the next layer's residual will be.
// * layer_norm: the mean first, so that the variance is a sum of squares and nothing cancels.
// * activate, gate_and_mul: silu or gelu from simd.h (relative error about 1e-7, the erf form 4e-7 in its negative tail).
// * add_parts: four vectors of each array at a time, so that the sums of long lists of arrays stay in registers.
// * rotary: cos and sin come as float32 rows, one per position; pairs are (i, i + r/2) or (2i, 2i + 1).

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace vllm_ms {
namespace ISA_NS {
VLLM_MS_DECLARE_KERNELS
namespace {

// Calls body(i, n) for whole vectors (n == VW) and the tail (n < VW).
template <class Body>
INLINE void for_vectors(long count, const Body& body) {
  long i = 0;
  for (; i + VW <= count; i += VW) body(i, long(VW));
  if (i < count) body(i, count - i);
}
template <class T>
INLINE vf read(const T* from, long n) {
  return n == VW ? load(from) : load_some(from, n);
}
template <class T>
INLINE void write(T* to, vf x, long n) {
  if (n == VW) store(to, x);
  else store_some(to, x, n);
}

// The value that `residual + x` is rounded to, stored in the residual; or x.
template <bool kAdd, class T>
INLINE vf take(const T* x, T* residual, long n) {
  if (!kAdd) return read(x, n);
  if (n < VW) {
    store_some(residual, load_some(residual, n) + load_some(x, n), n);
    return load_some(residual, n);
  }
  T rounded[VW];  // stays in a register
  store(rounded, load(residual) + load(x));
  memcpy(residual, rounded, sizeof(rounded));
  return load(rounded);
}

template <bool kAdd, class T>
static void norm_row(const T* x, T* residual, const float* weight, T* out, long features, float eps) {
  vf acc[4] = {};
  long i = 0;
  for (; i + 4 * VW <= features; i += 4 * VW) UNROLL
    for (int u = 0; u < 4; ++u) {
      vf value = take<kAdd>(x + i + u * VW, residual + i + u * VW, VW);
      acc[u] += value * value;
    }
  for_vectors(features - i, [&](long j, long n) {
    vf value = take<kAdd>(x + i + j, residual + i + j, n);
    acc[0] += value * value;
  });
  float mean = sum(acc[0] + acc[1] + (acc[2] + acc[3])) / float(features);
  float scale = 1.0f / __builtin_sqrtf(mean + eps);
  const T* values = kAdd ? residual : x;
  for_vectors(features, [&](long j, long n) { write(out + j, read(values + j, n) * scale * read(weight + j, n), n); });
}

template <bool kAdd, class T>
static void norm_rows(const T* x, T* residual, const float* weight, T* out, long rows, long features, float eps) {
  parallel_ranges(rows, features * long(sizeof(T)) * (kAdd ? 4 : 2), [&](long begin, long end) {
    for (long i = begin * features; i < end * features; i += features)
      norm_row<kAdd>(x + i, residual + i, weight, out + i, features, eps);
  });
}

// The sum of the row, of squared distances from its mean, then one pass that scales.
template <bool kAdd, class T>
static void layer_norm_row(const T* x, T* residual, const float* weight, const float* bias, T* out, long features,
                           float eps) {
  vf total = {}, squares = {};
  for_vectors(features, [&](long i, long n) { total += take<kAdd>(x + i, residual + i, n); });
  if (kAdd) x = residual;
  const float mean = sum(total) / float(features);
  const vf middle = splat(mean);
  for_vectors(features, [&](long i, long n) {
    vf off = read(x + i, n) - middle;
    if (n < VW) off = (kLanes < int(n)) ? off : splat(0.0f);
    squares += off * off;
  });
  const float scale = 1.0f / __builtin_sqrtf(sum(squares) / float(features) + eps);
  for_vectors(features, [&](long i, long n) {
    write(out + i, (read(x + i, n) - middle) * scale * read(weight + i, n) + read(bias + i, n), n);
  });
}

template <class T, class Function>
static void map_values(const T* x, T* out, long count, const Function& function) {
  constexpr long kGrain = 1024;
  parallel_ranges(ceil_div(count, kGrain), kGrain * 8, [&](long begin, long end) {
    const long first = begin * kGrain;
    for_vectors(min(end * kGrain, count) - first,
                [&](long i, long n) { write(out + first + i, function(read(x + first + i, n)), n); });
  });
}

template <class T, class Activation>
static void gate_values(const T* gate, const T* up, T* out, long count, const Activation& activation) {
  constexpr long kGrain = 1024;
  parallel_ranges(ceil_div(count, kGrain), kGrain * 8, [&](long begin, long end) {
    const long first = begin * kGrain;
    for_vectors(min(end * kGrain, count) - first, [&](long i, long n) {
      write(out + first + i, activation(read(gate + first + i, n)) * read(up + first + i, n), n);
    });
  });
}

// Floats; `n` values from `i`.
template <int kVectors, class T>
INLINE void add_vectors(const void* const* parts, int count, T* out, long i, long n) {
  vf sums[kVectors];
  UNROLL for (int u = 0; u < kVectors; ++u) sums[u] = read(static_cast<const T*>(parts[0]) + i + u * VW, n);
  for (int part = 1; part < count; ++part)
    UNROLL for (int u = 0; u < kVectors; ++u) sums[u] += read(static_cast<const T*>(parts[part]) + i + u * VW, n);
  UNROLL for (int u = 0; u < kVectors; ++u) write(out + i + u * VW, sums[u], n);
}

template <class T>
static void add_floats(const void* const* parts, int count, T* out, long begin, long end) {
  long i = begin;
  for (; i + 4 * VW <= end; i += 4 * VW) add_vectors<4>(parts, count, out, i, VW);
  for_vectors(end - i, [&](long j, long n) { add_vectors<1>(parts, count, out, i + j, n); });
}

// Sums of integers wrap around.
template <class T>
static void add_integers(const void* const* parts, int count, T* out, long begin, long end) {
  using Unsigned = std::make_unsigned_t<T>;
  for (long i = begin; i < end; ++i) {
    Unsigned total = 0;
    for (int part = 0; part < count; ++part) total = Unsigned(total + Unsigned(static_cast<const T*>(parts[part])[i]));
    out[i] = T(total);
  }
}

// Pairs (i, i + half).
template <class T>
static void rotate_halves(T* head, const float* cos, const float* sin, long half) {
  for_vectors(half, [&](long i, long n) {
    vf a = read(head + i, n), b = read(head + half + i, n), c = read(cos + i, n), s = read(sin + i, n);
    write(head + i, a * c - b * s, n);
    write(head + half + i, b * c + a * s, n);
  });
}

// Pairs (2i, 2i + 1): each vector times the cosines, plus itself with neighbours exchanged times the sines.
template <class T>
static void rotate_pairs(T* head, const float* cos, const float* sin, long half) {
  const vu sign = (vu)(kLanes + 1) << 31;  // of even lanes
  long i = 0;
  for (; i + VW <= half; i += VW) {
    vf c = load(cos + i), s = load(sin + i);
    UNROLL for (int part = 0; part < 2; ++part) {
      T* values = head + 2 * i + part * VW;
      vi lanes = (kLanes >> 1) + part * (VW / 2);
      vf a = load(values), b = __builtin_shuffle(a, kLanes ^ 1);
      store(values, a * __builtin_shuffle(c, lanes) + b * (vf)((vu)__builtin_shuffle(s, lanes) ^ sign));
    }
  }
  for (; i < half; ++i) {
    float a = load_one(head + 2 * i), b = load_one(head + 2 * i + 1);
    store_one(head + 2 * i, a * cos[i] - b * sin[i]);
    store_one(head + 2 * i + 1, b * cos[i] + a * sin[i]);
  }
}

template <class T>
static void rotate_heads(T* heads, long count, long size, const RotaryCall& call, const float* cos) {
  const long half = call.rotary_size / 2;
  for (long h = 0; h < count; ++h, heads += size) {
    if (call.interleaved) rotate_pairs(heads, cos, cos + half, half);
    else rotate_halves(heads, cos, cos + half, half);
  }
}

template <class T>
static void rotate(const RotaryCall& call) {
  const long heads = call.query_heads + call.key_heads, key_size = call.head_size - call.offset;
  parallel_ranges(call.tokens, heads * call.rotary_size * long(sizeof(T)) * 2, [&](long begin, long end) {
    for (long token = begin; token < end; ++token) {
      const float* cos = call.cos_sin + call.positions[token] * call.rotary_size;
      T* query = static_cast<T*>(call.query) + token * call.query_heads * call.head_size;
      T* key = static_cast<T*>(call.key) + token * call.key_heads * key_size;
      rotate_heads(query + call.offset, call.query_heads, call.head_size, call, cos);
      rotate_heads(key, call.key_heads, key_size, call, cos);
    }
  });
}

}  // namespace

const char* rms_norm(const void* x, const float* weight, void* out, int dtype, long rows, long features, double eps) {
  const float e = float(eps);
  auto run = [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    norm_rows<false>(static_cast<const T*>(x), static_cast<T*>(nullptr), weight, values, rows, features, e);
  };
  if (dtype == kFloat32) run(static_cast<float*>(out));
  else if (dtype == kBfloat16) run(static_cast<Bf16*>(out));
  else run(static_cast<F16*>(out));
  return nullptr;
}

const char* add_rms_norm(const void* x, void* residual, const float* weight, void* out, int dtype, long rows,
                         long features, double eps) {
  const float e = float(eps);
  auto run = [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    norm_rows<true>(static_cast<const T*>(x), static_cast<T*>(residual), weight, values, rows, features, e);
  };
  if (dtype == kFloat32) run(static_cast<float*>(out));
  else if (dtype == kBfloat16) run(static_cast<Bf16*>(out));
  else run(static_cast<F16*>(out));
  return nullptr;
}

template <bool kAdd>
static void layer_norms(const void* x, void* residual, const float* weight, const float* bias, void* out, int dtype,
                        long rows, long features, float eps) {
  auto run = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    const T* from = static_cast<const T*>(x);
    T* stream = static_cast<T*>(residual);
    parallel_ranges(rows, features * long(sizeof(T)) * (kAdd ? 5 : 3), [&](long begin, long end) {
      for (long i = begin * features; i < end * features; i += features)
        layer_norm_row<kAdd>(from + i, stream + i, weight, bias, to + i, features, eps);
    });
  };
  if (dtype == kFloat32) run(static_cast<float*>(out));
  else if (dtype == kBfloat16) run(static_cast<Bf16*>(out));
  else run(static_cast<F16*>(out));
}

const char* layer_norm(const void* x, const float* weight, const float* bias, void* out, int dtype, long rows,
                       long features, double eps) {
  layer_norms<false>(x, nullptr, weight, bias, out, dtype, rows, features, float(eps));
  return nullptr;
}

const char* add_layer_norm(const void* x, void* residual, const float* weight, const float* bias, void* out, int dtype,
                           long rows, long features, double eps) {
  layer_norms<true>(x, residual, weight, bias, out, dtype, rows, features, float(eps));
  return nullptr;
}

const char* activate(const void* x, void* out, int dtype, long count, Activation kind) {
  auto run = [&](auto* to) {
    const auto* from = static_cast<const std::remove_pointer_t<decltype(to)>*>(x);
    if (kind == Activation::kSilu) map_values(from, to, count, [](vf v) { return silu(v); });
    else if (kind == Activation::kGeluErf) map_values(from, to, count, [](vf v) { return gelu_erf(v); });
    else if (kind == Activation::kGeluTanh) map_values(from, to, count, [](vf v) { return gelu_tanh(v); });
    else if (kind == Activation::kQuickGelu)
      map_values(from, to, count, [](vf v) { return v / (1.0f + exponential(-1.702f * v)); });
    else map_values(from, to, count, [](vf v) { return (v < 0.0f) ? splat(0.0f) : v; });
  };
  if (dtype == kFloat32) run(static_cast<float*>(out));
  else if (dtype == kBfloat16) run(static_cast<Bf16*>(out));
  else run(static_cast<F16*>(out));
  return nullptr;
}

const char* gate_and_mul(const void* gate, const void* up, void* out, int dtype, long count, Gate kind) {
  auto run = [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    const T *g = static_cast<const T*>(gate), *u = static_cast<const T*>(up);
    if (kind == Gate::kSilu) gate_values(g, u, values, count, [](vf x) { return silu(x); });
    else if (kind == Gate::kGeluErf) gate_values(g, u, values, count, [](vf x) { return gelu_erf(x); });
    else gate_values(g, u, values, count, [](vf x) { return gelu_tanh(x); });
  };
  if (dtype == kFloat32) run(static_cast<float*>(out));
  else if (dtype == kBfloat16) run(static_cast<Bf16*>(out));
  else run(static_cast<F16*>(out));
  return nullptr;
}

void add_parts(const void* const* parts, int count, void* out, int dtype, long items) {
  parallel_ranges(items, dtype_size(dtype) * (count + 1), [&](long begin, long end) {
    if (dtype == kFloat32) add_floats(parts, count, static_cast<float*>(out), begin, end);
    else if (dtype == kBfloat16) add_floats(parts, count, static_cast<Bf16*>(out), begin, end);
    else if (dtype == kFloat16) add_floats(parts, count, static_cast<F16*>(out), begin, end);
    else if (dtype == kInt32) add_integers(parts, count, static_cast<int32_t*>(out), begin, end);
    else if (dtype == kInt64) add_integers(parts, count, static_cast<int64_t*>(out), begin, end);
    else add_integers(parts, count, static_cast<int8_t*>(out), begin, end);
  });
}

const char* rotary(const RotaryCall& call) {
  for (long token = 0; token < call.tokens; ++token)
    if (call.positions[token] < 0 || call.positions[token] >= call.max_position)
      return fail("rotary: position %ld of token %ld is outside of the %ld positions of cos_sin.",
                  long(call.positions[token]), token, call.max_position);
  if (call.dtype == kFloat32) rotate<float>(call);
  else if (call.dtype == kBfloat16) rotate<Bf16>(call);
  else rotate<F16>(call);
  return nullptr;
}

}  // namespace ISA_NS
}  // namespace vllm_ms
