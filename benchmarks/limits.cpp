// What this machine can do at most, measured: bytes read from memory per second, and dot products per second.
//
//   read   every thread streams its part of 1 GiB (in huge pages), summing 64-byte lines, several times; the best pass counts.
//   bf16   vdpbf16ps, 12 independent sums in registers (32 multiply-adds each), no memory. 0 without AVX-512 BF16.
//   int8   vpdpbusd, likewise (64 multiply-adds each). 0 without AVX-512 VNNI.
//   f32    fused multiply-adds on 12 vectors of the widest kind the compiler has.
//
// Prints one JSON object: GB/s and GFLOP/s (a multiply-add counts as two) with all threads. Use: limits THREADS

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

using Clock = std::chrono::steady_clock;

static double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Runs work(thread) on all threads at once; the wall time of the slowest.
template <class Work>
static double timed(int threads, Work work) {
  std::atomic<int> waiting{threads};
  std::vector<double> seconds(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      for (--waiting; waiting > 0;) {
      }
      auto begin = Clock::now();
      work(t);
      seconds[t] = seconds_since(begin);
    });
  double slowest = 0;
  for (int t = 0; t < threads; ++t) {
    pool[t].join();
    slowest = seconds[t] > slowest ? seconds[t] : slowest;
  }
  return slowest;
}

typedef float f32x16 __attribute__((vector_size(64)));
static volatile float sink;

static double read_bandwidth(int threads) {
  const size_t lines = (size_t(1) << 30) / 64, part = lines / threads;
  f32x16* data = static_cast<f32x16*>(aligned_alloc(2 << 20, lines * 64));
  madvise(data, lines * 64, MADV_HUGEPAGE);
  timed(threads, [&](int t) {
    for (size_t i = 0; i < part; ++i) data[t * part + i] = f32x16{} + 1.0f;
  });
  double best = 1e9;
  for (int pass = 0; pass < 8; ++pass) {
    double seconds = timed(threads, [&](int t) {
      f32x16 sums[4] = {};
      const f32x16* begin = data + t * part;
      for (size_t i = 0; i + 4 <= part; i += 4)
        for (int j = 0; j < 4; ++j) {
          __builtin_prefetch(begin + i + j + 32);
          sums[j] += begin[i + j];
        }
      sink = sums[0][0] + sums[1][0] + sums[2][0] + sums[3][0];
    });
    best = seconds < best ? seconds : best;
  }
  free(data);
  return double(part * threads) * 64 / best / 1e9;
}

constexpr int kSums = 12;
constexpr long kRounds = 20'000'000;

// Gflop/s of `step` on kSums independent sums, `flops` each.
template <class Vector, class Step>
static double peak(int threads, double flops, Step step) {
  double best = 1e9;
  for (int pass = 0; pass < 3; ++pass) {
    double seconds = timed(threads, [&](int) {
      Vector sums[kSums] = {};
      for (long i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (int j = 0; j < kSums; ++j) {
          sums[j] = step(sums[j]);
          asm volatile("" : "+v"(sums[j]));
        }
      }
#pragma GCC unroll 12
      for (int j = 0; j < kSums; ++j) asm volatile("" ::"v"(sums[j]));  // all of them are wanted
    });
    best = seconds < best ? seconds : best;
  }
  return double(kRounds) * kSums * flops * threads / best / 1e9;
}

int main(int count, char** arguments) {
  int threads = count > 1 ? atoi(arguments[1]) : int(std::thread::hardware_concurrency());
  double bf16 = 0, int8 = 0, f32 = 0;
#if defined(__AVX512BF16__)
  __m512bh pairs = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  bf16 = peak<__m512>(threads, 64, [=](__m512 sum) { return _mm512_dpbf16_ps(sum, pairs, pairs); });
#endif
#if defined(__AVX512VNNI__)
  __m512i bytes = _mm512_set1_epi8(1);
  int8 = peak<__m512i>(threads, 128, [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, bytes, bytes); });
#endif
#if defined(__AVX512F__)
  __m512 half = _mm512_set1_ps(0.5f);
  f32 = peak<__m512>(threads, 32, [=](__m512 sum) { return _mm512_fmadd_ps(sum, half, half); });
#elif defined(__AVX2__)
  typedef float f32x8 __attribute__((vector_size(32)));
  f32 = peak<f32x8>(threads, 16, [](f32x8 sum) { return sum * 0.5f + 0.5f; });
#endif
  printf("{\"threads\": %d, \"read_gb_s\": %.1f, \"bf16_gflop_s\": %.0f, \"int8_gop_s\": %.0f, \"f32_gflop_s\": %.0f}\n",
         threads, read_bandwidth(threads), bf16, int8, f32);
}
