// Random bits -> uniform -> standard normal (Box-Muller), shared word for word by the host compiler and nvcc.
//
// Bit-identity across compilers rests on three rules: every fused multiply-add is written out and nothing else is
// contracted (-ffp-contract=off, -fmad=false); only correctly rounded operations are used (add, multiply, fma, sqrt, integer
// conversions); constants are hexadecimal floats. fastebm/ops/normal.py and fastebm/ops/triton/philox.py repeat this file.
#pragma once

#include <cmath>
#include <cstring>

#include "philox.h"

namespace fastebm {

FASTEBM_INLINE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

FASTEBM_INLINE double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

FASTEBM_INLINE int32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(x);
#else
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

FASTEBM_INLINE float float_of(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

FASTEBM_INLINE float rounded_sqrt(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

#if defined(__CUDA_ARCH__)
// 1 / sqrt(x) within 2^-22.4 of it, for x no smaller than the normal numbers.
__device__ __forceinline__ float approximate_rsqrt(float x) {
#if defined(__NVCC__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return rsqrt_approx_ftz(x);  // of a host build, tests/gpu/host_build
#endif
}
#endif

// The rounded square root of x = 0 or x in [2^-24, 2^7], which holds of -2 log(u). On a GPU the root for all of float32 takes
// branches. Here Newton's steps lead from an approximation to the rounded root, wherever within 4 units in the last place of
// 1 / sqrt(x) it lies; tests/gpu/test_host_build.py goes through all x and all of these.
FASTEBM_INLINE float root_of_log(float x) {
#if defined(__CUDA_ARCH__)
  const float inverse = approximate_rsqrt(x + 0x1p-100f);  // finite for x = 0
  float root = x * inverse, half = 0.5f * inverse;
  const float error = fused(-root, half, 0.5f);
  root = fused(root, error, root);
  half = fused(half, error, half);
  return fused(fused(-root, root, x), half, root);
#else
  return rounded_sqrt(x);
#endif
}

// In (0, 1]: the half added to every integer keeps the logarithm finite; the largest integers round to 1.
FASTEBM_INLINE float uniform_from_bits(uint32_t bits, float half = 0x1p-33f) {
  return fused(static_cast<float>(bits), 0x1p-32f, half);
}

// p in log(1 + f) = f - f^2 p(f) / 2 for 1 + f in [sqrt(1/2), sqrt(2)): minimax of degree 7 with p(0) fixed, relative
// error 3.3e-8.
FASTEBM_INLINE float log_polynomial(float f) {
  float p = -0x1.6d469ep-3f;
  p = fused(p, f, 0x1.25e46ap-2f);
  p = fused(p, f, -0x1.30ae24p-2f);
  p = fused(p, f, 0x1.5343a2p-2f);
  p = fused(p, f, -0x1.98e430p-2f);
  p = fused(p, f, 0x1.000494p-1f);
  p = fused(p, f, -0x1.5556b6p-1f);
  p = fused(p, f, 1.0f);
  return p;
}

// -2 log(u) for u in (0, 1]. u = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
FASTEBM_INLINE float minus_two_log(float u) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const int32_t bits = bits_of(u);
  const int32_t scaled = (bits - kSqrtHalf) & ~0x7fffff;  // 2^23 k
  const float f = float_of(bits - scaled) - 1.0f;
  const float log1p = fused(f * f, log_polynomial(f), -2.0f * f);
  return fused(static_cast<float>(scaled), -0x1.62e430p-23f, log1p);
}

// An angle in quarter turns, 4 uniform_from_bits(bits). The last term is half a step of the integers.
FASTEBM_INLINE float quarters_from_bits(uint32_t bits, float half = 0x1p-31f) {
  return fused(static_cast<float>(bits), 0x1p-30f, half);
}

// cos and sin of an angle in (0, 4] quarter turns: the nearest is taken off exactly, the rest, at most an eighth of a turn,
// goes through minimax polynomials (relative errors 6e-11 and 3e-9), the quarter turns become a swap and signs.
FASTEBM_INLINE void cos_sin_quarters(float quarters, float& cosine, float& sine) {
  const int32_t quadrant = static_cast<int32_t>(quarters + 0.5f);
  const float r = quarters - static_cast<float>(quadrant);
  const float z = r * r;
  float s = -0x1.2d9b30p-8f;
  s = fused(s, z, 0x1.465ec4p-4f);
  s = fused(s, z, -0x1.4abbbap-1f);
  s = fused(s, z, 0x1.921fb6p+0f);
  s = s * r;
  float c = 0x1.d9d4a6p-11f;
  c = fused(c, z, -0x1.55c5dcp-6f);
  c = fused(c, z, 0x1.03c1dep-2f);
  c = fused(c, z, -0x1.3bd3ccp+0f);
  c = fused(c, z, 1.0f);
  const bool swap = (quadrant & 1) != 0;
  const int32_t cosine_sign = ((quadrant + 1) & 2) << 30;
  const int32_t sine_sign = (quadrant & 2) << 30;
  cosine = float_of(bits_of(swap ? s : c) ^ cosine_sign);
  sine = float_of(bits_of(swap ? c : s) ^ sine_sign);
}

// Two independent standard normals: radius from the first word, angle from the second.
FASTEBM_INLINE void normal_pair(uint32_t radius_bits, float quarters, float& first, float& second) {
  const float radius = root_of_log(minus_two_log(uniform_from_bits(radius_bits)));
  float cosine, sine;
  cos_sin_quarters(quarters, cosine, sine);
  first = radius * cosine;
  second = radius * sine;
}
FASTEBM_INLINE void normal_pair(uint32_t radius_bits, uint32_t angle_bits, float& first, float& second) {
  normal_pair(radius_bits, quarters_from_bits(angle_bits), first, second);
}

}  // namespace fastebm
