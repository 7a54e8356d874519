// Products of pairs of bfloat16 numbers in float32, and rounding to bfloat16 (AVX512-BF16).
// Part of program_variant.h, which compiles it once for each instruction set.
//
// They round to the nearest, ties to even, and take subnormal numbers for zero.
#pragma once

#include "program_vectors.h"

#if FASTEBM_PAIRS
typedef __m512bh Pairs;  // 16 pairs

static FASTEBM_INLINE Pairs load_pairs(const void* p) { return (Pairs)_mm512_loadu_si512(p); }

// Two neighbours in memory, 16 times.
static FASTEBM_INLINE Pairs broadcast_pair(const void* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return (Pairs)_mm512_set1_epi32(pair);
}

// One number and a zero, 16 times. Nothing behind the number is read.
static FASTEBM_INLINE Pairs broadcast_one(const void* p) {
  uint16_t one;
  __builtin_memcpy(&one, p, sizeof one);
  return (Pairs)_mm512_set1_epi32(one);
}

// sum[k] + a[2k] b[2k] + a[2k + 1] b[2k + 1]
static FASTEBM_INLINE Vector add_products(Vector sum, Pairs a, Pairs b) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, a, b);
}
#endif
