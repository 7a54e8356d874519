// Draws noise for up to 1024 consecutive elements of one chain into a buffer that stays in L1.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../normal.h"
#include "variants.h"

namespace fastebm {

// A stretch is worked on in L1: 1024 floats of noise are 4 KiB.
constexpr int64_t kStretch = 1024;
// Quads drawn at once: one AVX-512 register of counters.
constexpr int kLanes = 16;

struct alignas(64) BitsGroup {
  uint32_t lane[4][kLanes];
};

// Philox over kLanes consecutive quads. The plain loop is right everywhere; the two specialisations exist because GCC turns the
// 32x32 -> 64 bit products into 64-bit multiplies (vpmullq, 3 times slower over all). They keep one counter in each 64-bit lane,
// even quads in one register and odd quads in the other, so that a round is two widening multiplies, two shifts and two exclusive
// ors; the upper halves may hold anything, since vpmuludq reads only the lower ones.
template <Isa isa>
struct PhiloxGroup {
  static FASTEBM_INLINE void draw(BitsGroup& out, uint32_t quad, const NoiseAddress& at) {
    for (int i = 0; i < kLanes; ++i) {
      const Quad bits = philox(quad + static_cast<uint32_t>(i), at);
      for (int lane = 0; lane < 4; ++lane) out.lane[lane][i] = bits.lane[lane];
    }
  }
};

#if defined(__x86_64__)
template <>
struct PhiloxGroup<Isa::avx512> {
  FASTEBM_TARGET_AVX512 static FASTEBM_INLINE void draw(BitsGroup& out, uint32_t quad, const NoiseAddress& at) {
    const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53u), multiplier1 = _mm512_set1_epi64(0xCD9E8D57u);
    const __m512i first = _mm512_add_epi32(_mm512_set1_epi64(quad), _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0));
    __m512i c0[2] = {first, _mm512_add_epi32(first, _mm512_set1_epi64(1))}, c1[2], c2[2], c3[2];
    for (int odd = 0; odd < 2; ++odd) {
      c1[odd] = _mm512_set1_epi64(at.step);
      c2[odd] = _mm512_set1_epi64(at.chain_low);
      c3[odd] = _mm512_set1_epi64(at.stream_and_chain_high);
    }
    uint32_t k0 = at.seed_low, k1 = at.seed_high;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const __m512i product0 = _mm512_mul_epu32(c0[odd], multiplier0), product1 = _mm512_mul_epu32(c2[odd], multiplier1);
        c0[odd] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[odd], key0, 0x96);
        c1[odd] = product1;
        c2[odd] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[odd], key1, 0x96);
        c3[odd] = product0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const __m512i* words[4] = {c0, c1, c2, c3};
#pragma GCC unroll 4
    for (int lane = 0; lane < 4; ++lane)
      _mm512_store_si512(out.lane[lane], _mm512_mask_shuffle_epi32(words[lane][0], 0xAAAA, words[lane][1], _MM_PERM_CDAB));
  }
};

template <>
struct PhiloxGroup<Isa::avx2> {
  FASTEBM_TARGET_AVX2 static FASTEBM_INLINE void draw(BitsGroup& out, uint32_t quad, const NoiseAddress& at) {
    half(out, 0, quad, at);
    half(out, 8, quad + 8, at);
  }

 private:
  FASTEBM_TARGET_AVX2 static FASTEBM_INLINE void half(BitsGroup& out, int offset, uint32_t quad, const NoiseAddress& at) {
    const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53u), multiplier1 = _mm256_set1_epi64x(0xCD9E8D57u);
    const __m256i first = _mm256_add_epi32(_mm256_set1_epi64x(quad), _mm256_set_epi64x(6, 4, 2, 0));
    __m256i c0[2] = {first, _mm256_add_epi32(first, _mm256_set1_epi64x(1))}, c1[2], c2[2], c3[2];
    for (int odd = 0; odd < 2; ++odd) {
      c1[odd] = _mm256_set1_epi64x(at.step);
      c2[odd] = _mm256_set1_epi64x(at.chain_low);
      c3[odd] = _mm256_set1_epi64x(at.stream_and_chain_high);
    }
    uint32_t k0 = at.seed_low, k1 = at.seed_high;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const __m256i product0 = _mm256_mul_epu32(c0[odd], multiplier0), product1 = _mm256_mul_epu32(c2[odd], multiplier1);
        c0[odd] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), key0), c1[odd]);
        c1[odd] = product1;
        c2[odd] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), key1), c3[odd]);
        c3[odd] = product0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const __m256i* words[4] = {c0, c1, c2, c3};
#pragma GCC unroll 4
    for (int lane = 0; lane < 4; ++lane)
      _mm256_store_si256(reinterpret_cast<__m256i*>(out.lane[lane] + offset),
                         _mm256_blend_epi32(words[lane][0], _mm256_slli_epi64(words[lane][1], 32), 0xAA));
  }
};
#endif

struct NormalNoise {
  static FASTEBM_INLINE void draw(float* __restrict out, const BitsGroup& bits) {
    for (int i = 0; i < kLanes; ++i) {
      normal_pair(bits.lane[0][i], bits.lane[1][i], out[4 * i], out[4 * i + 1]);
      normal_pair(bits.lane[2][i], bits.lane[3][i], out[4 * i + 2], out[4 * i + 3]);
    }
  }
};

struct UniformNoise {
  static FASTEBM_INLINE void draw(float* __restrict out, const BitsGroup& bits) {
    for (int i = 0; i < kLanes; ++i)
      for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = uniform_from_bits(bits.lane[lane][i]);
  }
};

// Fills `out` (kStretch floats) with elements [4 * first_quad, 4 * first_quad + count) of a chain, count <= kStretch; whole
// groups of kLanes quads are written. Bits of two groups are drawn before either is transformed: rounds of Philox are a chain of
// dependent operations, and two chains side by side hide each other's latency (8 % faster in all). A call for each stretch, not
// inlined: GCC inlines a function with a target only into one that has it.
#define FASTEBM_DRAW_STRETCH(NAME, TARGET, ISA)                                                                            \
  template <class Noise>                                                                                                   \
  TARGET __attribute__((noinline)) void NAME(float* __restrict out, uint32_t first_quad, int64_t count, NoiseAddress at) { \
    BitsGroup bits[2];                                                                                                     \
    for (int64_t base = 0; 4 * base < count; base += 2 * kLanes) {                                                         \
      const bool both = 4 * (base + kLanes) < count;                                                                       \
      const uint32_t quad = first_quad + static_cast<uint32_t>(base);                                                      \
      PhiloxGroup<ISA>::draw(bits[0], quad, at);                                                                           \
      if (both) PhiloxGroup<ISA>::draw(bits[1], quad + kLanes, at);                                                        \
      Noise::draw(out + 4 * base, bits[0]);                                                                                \
      if (both) Noise::draw(out + 4 * (base + kLanes), bits[1]);                                                           \
    }                                                                                                                      \
  }
FASTEBM_DRAW_STRETCH(draw_stretch_baseline, , Isa::baseline)
#if defined(__x86_64__)
FASTEBM_DRAW_STRETCH(draw_stretch_avx2, FASTEBM_TARGET_AVX2, Isa::avx2)
FASTEBM_DRAW_STRETCH(draw_stretch_avx512, FASTEBM_TARGET_AVX512, Isa::avx512)
#endif

template <class Noise, Isa isa>
FASTEBM_INLINE void draw_stretch(float* __restrict out, uint32_t first_quad, int64_t count, const NoiseAddress& at) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::avx512) return draw_stretch_avx512<Noise>(out, first_quad, count, at);
  if constexpr (isa == Isa::avx2) return draw_stretch_avx2<Noise>(out, first_quad, count, at);
#endif
  return draw_stretch_baseline<Noise>(out, first_quad, count, at);
}

}  // namespace fastebm
