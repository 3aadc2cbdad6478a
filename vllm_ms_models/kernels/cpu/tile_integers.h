// The micro-kernel's W's for weights of small integers (tile.h, gemm_integers.cpp); Bytes and ByteDots also for the
// cache of int8 (attention_tile.h):
//
//   W            a step of a panel                     activation            multiply-add
//   IntegerDots  16 x 4 bytes (k ... k+3), + 128       4 signed bytes        vpdpbusd (AVX-512 VNNI only)
//   IntegerPairs the same                              4 int16               widen to int16 by shift and mask, pmaddwd
//   Bytes        16 bytes                              float32               widen, FMA
//   ByteDots     2 x 16 bytes (k and k+1)              1 pair of bf16        widen to a pair of bf16, vdpbf16ps
//   Nibbles      16 x 8 nibbles (k ... k+7)            8 float32             widen, 8 FMA
//   NibbleDots   the same                              4 pairs of bf16       widen by a table, 4 vdpbf16ps
//
// Numbers. vpdpbusd multiplies unsigned by signed bytes and adds the four products to an int32: exact, no saturation.
// Only activations can be its operand from memory, broadcast, and those are signed; so the weights are made unsigned by
// adding 128 when they are loaded (gemm_scales.h takes it off again). pmaddwd adds two products of 16 bits each, exactly;
// the shorter pmaddubsw would saturate. Every integer of 8 bits is a bf16 number, so ByteDots and NibbleDots widen
// without rounding.
//
// Nibbles. Lane i of a step is a 32-bit word of row i: input 2 j is in bits 4 j ..., input 2 j + 1 in bits 16 + 4 j ....
// A shift by 4 j therefore moves a pair to the low ends of the word's two halves, and one look-up for all halves (vpermw:
// 32 entries, of an index only the low 5 bits count) makes it a pair of bf16. The fifth bit belongs to a neighbour: the
// 16 values stand in the table twice. Two instructions for 32 weights.
#pragma once

#include "tile.h"

namespace vllm_ms {
namespace ISA_NS {

struct Scaled {};  // small integers: gemm_scales.h finishes the sums

#if defined(__AVX512VNNI__)
struct IntegerDots : Scaled {
  typedef uint32_t X;
  typedef vi Acc;
  typedef vu Raw;
  static constexpr int kDepth = 4, kSubsteps = 1, kStepBytes = 64;
  INLINE vu widen(Raw raw, int) { return raw; }
  INLINE vi multiply_add(vi acc, uint32_t x, vu w) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)splat_bits(x));
  }
};
typedef IntegerDots IntegerProducts;
#else
// Inputs k and k + 2 make the first pair, k + 1 and k + 3 the second.
struct IntegerPairs : Scaled {
  typedef uint32_t X;
  typedef vi Acc;
  typedef vu Raw;
  static constexpr int kDepth = 4, kSubsteps = 2, kStepBytes = 64;
  INLINE vu widen(Raw raw, int substep) { return (raw >> (8 * substep)) & 0x00ff00ffu; }
  INLINE vi multiply_add(vi acc, uint32_t x, vu w) {
#if defined(__AVX512BW__)
    return acc + (vi)_mm512_madd_epi16((__m512i)w, (__m512i)splat_bits(x));
#elif defined(__AVX2__)
    return acc + (vi)_mm256_madd_epi16((__m256i)w, (__m256i)splat_bits(x));
#elif defined(__SSE2__)
    return acc + (vi)_mm_madd_epi16((__m128i)w, (__m128i)splat_bits(x));
#else
    return acc + (vi)(w & 0xffffu) * int32_t(int16_t(x)) + (vi)(w >> 16) * int32_t(int16_t(x >> 16));
#endif
  }
};
typedef IntegerPairs IntegerProducts;
#endif

struct Bytes : Scaled, FusedMultiplyAdd {
  typedef float X;
  typedef vf Acc;
  typedef vb Raw;
  static constexpr int kDepth = 1, kSubsteps = 1, kStepBytes = 16;
  INLINE vf widen(Raw raw, int) { return from_int8(raw); }
};

struct Nibbles : Scaled, FusedMultiplyAdd {
  typedef float X;
  typedef vf Acc;
  typedef vu Raw;
  static constexpr int kDepth = 8, kSubsteps = 8, kStepBytes = 64;
  INLINE vf widen(Raw raw, int substep) {
    const int at = substep / 2 * 4 + substep % 2 * 16;
#if defined(__AVX512F__)
    __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    keep_in_register(table);
    return (vf)_mm512_permutexvar_ps((__m512i)(raw >> at), table);  // the low 4 bits of an index count
#else
    return __builtin_convertvector((vi)(raw << (28 - at)) >> 28, vf);
#endif
  }
};

#if defined(__AVX512BF16__)
struct ByteDots : Scaled, DotProduct {
  typedef uint32_t X;
  typedef vf Acc;
  struct Raw {
    __m128i even, odd;
  };
  static constexpr int kDepth = 2, kSubsteps = 1, kStepBytes = 32;
  INLINE vu widen(const Raw& raw, int) {
    return (vu)from_int8((vb)raw.even) >> 16 | (vu)from_int8((vb)raw.odd);
  }
};

struct NibbleDots : Scaled, DotProduct {
  typedef uint32_t X;
  typedef vf Acc;
  typedef vu Raw;
  static constexpr int kDepth = 8, kSubsteps = 4, kStepBytes = 64;
  INLINE vu widen(Raw raw, int substep) {
    typedef uint16_t Table __attribute__((vector_size(64)));
#define VLLM_MS_NIBBLES                                                                                          \
  0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, \
      0xc000, 0xbf80
    Table table = {VLLM_MS_NIBBLES, VLLM_MS_NIBBLES};  // 0 ... 7, -8 ... -1
    keep_in_register(table);
#undef VLLM_MS_NIBBLES
    return (vu)_mm512_permutexvar_epi16((__m512i)(raw >> (4 * substep)), (__m512i)table);
  }
};
#endif

}  // namespace ISA_NS
}  // namespace vllm_ms
