// Vectors of one instruction set: fused multiply-adds, and loads of float32 or bfloat16.
// Part of weight_gradients_variant.h, which compiles it once for each instruction set.
#pragma once

#include "program_rows.h"

constexpr int kVector = FASTEBM_VECTOR;

static FASTEBM_INLINE Vector splat(float a) {
#if FASTEBM_VECTOR == 16
  return (Vector)_mm512_set1_ps(a);
#elif FASTEBM_VECTOR == 8
  return (Vector)_mm256_set1_ps(a);
#else
  return Vector{a, a, a, a};
#endif
}

// a * b + c, rounded once: the same bits everywhere.
static FASTEBM_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
#if FASTEBM_VECTOR == 16
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTEBM_VECTOR == 8
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < kVector; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  // Without the instruction: the product is exact in float64, and the sum is rounded to odd there, which a second rounding to
  // float32 leaves right (Boldo & Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
  for (int i = 0; i < kVector; ++i) {
    const double product = static_cast<double>(a[i]) * static_cast<double>(b[i]), wide = static_cast<double>(c[i]);
    double sum = product + wide;
    const double back = sum - product, lost = (product - (sum - back)) + (wide - back);
    int64_t bits;
    __builtin_memcpy(&bits, &sum, sizeof bits);
    if ((lost > 0 || lost < 0) && (bits & 1) == 0) bits += (lost > 0) == (sum > 0) ? 1 : -1;
    __builtin_memcpy(&sum, &bits, sizeof bits);
    c[i] = static_cast<float>(sum);
  }
  return c;
#endif
}

static FASTEBM_INLINE Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
static FASTEBM_INLINE void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

// A whole vector of numbers.
static FASTEBM_INLINE Vector load_numbers(const char* p, int64_t bytes) {
  if (bytes == 4) return load(reinterpret_cast<const float*>(p));
#if FASTEBM_VECTOR == 16
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif FASTEBM_VECTOR == 8
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  Vector v;
  for (int i = 0; i < kVector; ++i) v[i] = number_at(p + 2 * i, 2);
  return v;
#endif
}

// The first `count` numbers, and zeros behind them.
static FASTEBM_INLINE Vector load_some(const char* p, int64_t bytes, int64_t count) {
  if (count >= kVector) return load_numbers(p, bytes);
#if FASTEBM_VECTOR == 16
  const __mmask16 there = static_cast<__mmask16>((1u << count) - 1u);
  if (bytes == 4) return (Vector)_mm512_maskz_loadu_ps(there, p);
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, p)), 16);
#else
  Vector v{};
  for (int i = 0; i < kVector; ++i)
    if (i < count) v[i] = number_at(p + i * bytes, bytes);
  return v;
#endif
}

static FASTEBM_INLINE void store_some(float* p, Vector v, int64_t count) {
  if (count >= kVector) return store(p, v);
#if FASTEBM_VECTOR == 16
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), (__m512)v);
#else
  for (int i = 0; i < kVector; ++i)
    if (i < count) p[i] = v[i];
#endif
}
