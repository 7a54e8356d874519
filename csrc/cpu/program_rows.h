// Reads and writes the channels of one pixel as float32, whether its buffer holds float32 or bfloat16.
// Part of program_variant.h, which compiles it once for each instruction set.
#pragma once

#include "program_vectors.h"

static FASTEBM_INLINE float widened(uint16_t h) { return float_of(static_cast<int32_t>(static_cast<uint32_t>(h) << 16)); }

// To the nearest, ties to even; NaN stays NaN.
static FASTEBM_INLINE uint16_t narrowed(float f) {
  const uint32_t u = static_cast<uint32_t>(bits_of(f));
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static FASTEBM_INLINE float number_at(const char* p, int64_t bytes) {
  return bytes == 2 ? widened(*reinterpret_cast<const uint16_t*>(p)) : *reinterpret_cast<const float*>(p);
}

// Calls f(i) for the channels of a row. Full and half blocks have loops of fixed length, which vectorise best.
template <class F>
static FASTEBM_INLINE void for_each_of(int count, F f) {
  if (count == kBlock) {
#pragma GCC ivdep
    for (int i = 0; i < kBlock; ++i) f(i);
  } else if (count == kBlock / 2) {
#pragma GCC ivdep
    for (int i = 0; i < kBlock / 2; ++i) f(i);
  } else {
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) f(i);
  }
}

// Calls f(i, value) for the channels of a row in memory.
template <class F>
static FASTEBM_INLINE void for_each_channel(const char* p, int64_t bytes, int count, F f) {
  if (bytes == 2) {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
    for_each_of(count, [&](int i) __attribute__((always_inline)) { f(i, widened(h[i])); });
  } else {
    const float* h = reinterpret_cast<const float*>(p);
    for_each_of(count, [&](int i) __attribute__((always_inline)) { f(i, h[i]); });
  }
}

template <class F>
static FASTEBM_INLINE void store_channels(char* p, int64_t bytes, int count, F value) {
  if (bytes == 2) {
    uint16_t* h = reinterpret_cast<uint16_t*>(p);
    for_each_of(count, [&](int i) __attribute__((always_inline)) { h[i] = narrowed(value(i)); });
  } else {
    float* h = reinterpret_cast<float*>(p);
    for_each_of(count, [&](int i) __attribute__((always_inline)) { h[i] = value(i); });
  }
}

#if FASTEBM_VECTOR == 16
// A full row of 32 channels in two registers: what nearly all of a net's blocks are made of.
struct Row {
  __m512 low, high;
};

template <int bytes>
static FASTEBM_INLINE Row load_row(const char* p) {
  if constexpr (bytes == 2) {
    const __m512i h = _mm512_loadu_si512(p);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(h)),
                  high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(h, 1));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(low, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(high, 16))};
  } else {
    const float* f = reinterpret_cast<const float*>(p);
    return {_mm512_loadu_ps(f), _mm512_loadu_ps(f + 16)};
  }
}

static FASTEBM_INLINE __m256i narrowed_vector(__m512 f) {
#if FASTEBM_PAIRS
  return (__m256i)_mm512_cvtneps_pbh(f);
#else
  const __m512i u = _mm512_castps_si512(f), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

template <int bytes>
static FASTEBM_INLINE void store_row(char* p, const Row& row) {
  if constexpr (bytes == 2) {
    const __m512i low = _mm512_castsi256_si512(narrowed_vector(row.low));
    _mm512_storeu_si512(p, _mm512_inserti64x4(low, narrowed_vector(row.high), 1));
  } else {
    float* f = reinterpret_cast<float*>(p);
    _mm512_storeu_ps(f, row.low);
    _mm512_storeu_ps(f + 16, row.high);
  }
}
#endif
