// Norms, gated activations, rotary embedding: everything that touches each value once or twice.
//
// These kernels are limited by memory (many rows) or by their own call overhead (one row: 896 values take 0.1 us). So
// they read and write each value once per pass, compute in float32 whatever the storage type, round once, and use a
// second core only above ~64 KB of traffic (`parallel_ranges`): waking it costs as much as 32 KB of work.
//
// * rms_norm: the sum of squares runs in four vector accumulators (FMA latency 4), then one pass scales. A row stays in
// L1
//   between the passes. add_rms_norm first rounds x + residual to the storage type, then normalises the *rounded*
//   value, because that is what the next layer's residual will be.
// * gate_and_mul: silu or gelu from simd.h (relative error about 1e-7, the erf form 4e-7 in its negative tail).
// * rotary: cos and sin come as float32 rows, one per position; pairs are (i, i + r/2) or (2i, 2i + 1). Whole vectors
// for the
//   first form; the interleaved one is computed in pairs of scalars, which the compiler vectorises well enough.

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

template <class T>
static void norm_row(const T* x, const float* weight, T* out, long features, float eps) {
  vf acc[4] = {};
  long i = 0;
  for (; i + 4 * VW <= features; i += 4 * VW) UNROLL
    for (int u = 0; u < 4; ++u) {
      vf value = load(x + i + u * VW);
      acc[u] += value * value;
    }
  for_vectors(features - i, [&](long j, long n) {
    vf value = read(x + i + j, n);
    acc[0] += value * value;
  });
  float mean = sum(acc[0] + acc[1] + (acc[2] + acc[3])) / float(features);
  float scale = 1.0f / __builtin_sqrtf(mean + eps);
  for_vectors(features, [&](long j, long n) { write(out + j, read(x + j, n) * scale * read(weight + j, n), n); });
}

template <class T>
static void norm_rows(const T* x, T* residual, const float* weight, T* out, long rows, long features, float eps) {
  parallel_ranges(rows, features * long(sizeof(T)) * 3, [&](long begin, long end) {
    for (long row = begin; row < end; ++row) {
      const T* in = x + row * features;
      if (residual) {
        T* sum = residual + row * features;
        for_vectors(features, [&](long j, long n) { write(sum + j, read(sum + j, n) + read(in + j, n), n); });
        in = sum;
      }
      norm_row(in, weight, out + row * features, features, eps);
    }
  });
}

template <class T>
static void gate_values(const T* gate, const T* up, T* out, long count, Gate kind) {
  constexpr long kGrain = 1024;
  long grains = ceil_div(count, kGrain);
  parallel_ranges(grains, kGrain * 8, [&](long begin, long end) {
    for_vectors(min(end * kGrain, count) - begin * kGrain, [&](long i, long n) {
      i += begin * kGrain;
      vf x = read(gate + i, n);
      vf activated = kind == Gate::kSilu ? silu(x) : kind == Gate::kGeluErf ? gelu_erf(x) : gelu_tanh(x);
      write(out + i, activated * read(up + i, n), n);
    });
  });
}

template <class T>
static void rotate_head(T* head, const float* cos, const float* sin, long half, bool interleaved) {
  if (interleaved) {
    for (long i = 0; i < half; ++i) {
      float a = load_one(head + 2 * i), b = load_one(head + 2 * i + 1);
      store_one(head + 2 * i, a * cos[i] - b * sin[i]);
      store_one(head + 2 * i + 1, b * cos[i] + a * sin[i]);
    }
    return;
  }
  for_vectors(half, [&](long i, long n) {
    vf a = read(head + i, n), b = read(head + half + i, n), c = read(cos + i, n), s = read(sin + i, n);
    write(head + i, a * c - b * s, n);
    write(head + half + i, b * c + a * s, n);
  });
}

template <class T>
static void rotate(const RotaryCall& call) {
  const long half = call.rotary_size / 2, heads = call.query_heads + call.key_heads;
  parallel_ranges(call.tokens, heads * call.rotary_size * long(sizeof(T)) * 2, [&](long begin, long end) {
    for (long token = begin; token < end; ++token) {
      const float* cos = call.cos_sin + call.positions[token] * call.rotary_size;
      T* query = static_cast<T*>(call.query) + token * call.query_heads * call.head_size;
      T* key = static_cast<T*>(call.key) + token * call.key_heads * call.head_size;
      for (long h = 0; h < call.query_heads; ++h)
        rotate_head(query + h * call.head_size, cos, cos + half, half, call.interleaved);
      for (long h = 0; h < call.key_heads; ++h)
        rotate_head(key + h * call.head_size, cos, cos + half, half, call.interleaved);
    }
  });
}

}  // namespace

const char* rms_norm(const void* x, const float* weight, void* out, int dtype, long rows, long features, double eps) {
  float e = float(eps);
  if (dtype == kFloat32)
    norm_rows<float>(static_cast<const float*>(x), nullptr, weight, static_cast<float*>(out), rows, features, e);
  else if (dtype == kBfloat16)
    norm_rows<Bf16>(static_cast<const Bf16*>(x), nullptr, weight, static_cast<Bf16*>(out), rows, features, e);
  else norm_rows<F16>(static_cast<const F16*>(x), nullptr, weight, static_cast<F16*>(out), rows, features, e);
  return nullptr;
}

const char* add_rms_norm(const void* x, void* residual, const float* weight, void* out, int dtype, long rows,
                         long features, double eps) {
  float e = float(eps);
  if (dtype == kFloat32)
    norm_rows(static_cast<const float*>(x), static_cast<float*>(residual), weight, static_cast<float*>(out), rows,
              features, e);
  else if (dtype == kBfloat16)
    norm_rows(static_cast<const Bf16*>(x), static_cast<Bf16*>(residual), weight, static_cast<Bf16*>(out), rows,
              features, e);
  else
    norm_rows(static_cast<const F16*>(x), static_cast<F16*>(residual), weight, static_cast<F16*>(out), rows, features,
              e);
  return nullptr;
}

const char* gate_and_mul(const void* gate, const void* up, void* out, int dtype, long count, Gate kind) {
  if (dtype == kFloat32)
    gate_values(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<float*>(out), count, kind);
  else if (dtype == kBfloat16)
    gate_values(static_cast<const Bf16*>(gate), static_cast<const Bf16*>(up), static_cast<Bf16*>(out), count, kind);
  else gate_values(static_cast<const F16*>(gate), static_cast<const F16*>(up), static_cast<F16*>(out), count, kind);
  return nullptr;
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
