// Elementary functions of lane programs in float32: branch-free, so that loops over them vectorise, and the same bits for
// every instruction set.
//
// Every function takes all of float32: infinities, NaN and numbers below the normal ones. tests/ops/test_lanes.py measures
// each against mpmath.
#pragma once

#include "activations.h"

namespace fastebm {

// 2^n for an integer n in [-126, 127], held as a float.
FASTEBM_INLINE float lane_power_of_two(int32_t n) { return float_of((n + 127) << 23); }

// z = k log 2 + r with |r| <= log(2) / 2, for |z| up to 104: gives e^r - 1 and k.
FASTEBM_INLINE float lane_reduced_exp(float z, int32_t& k) {
  constexpr float kRound = 0x1.8p+23f;
  const float shifted = fused(z, 0x1.715476p+0f, kRound), n = shifted - kRound;
  const float r = fused(n, 0x1.bd0106p-13f, fused(n, -0x1.63p-1f, z));
  float q = 0x1.6d71dep-10f;
  q = fused(q, r, 0x1.122736p-7f);
  q = fused(q, r, 0x1.5554c8p-5f);
  q = fused(q, r, 0x1.5554b0p-3f);
  q = fused(q, r, 0.5f);
  k = bits_of(shifted) - 0x4b400000;
  return fused(r * r, q, r);
}

// e^x. The scale 2^k is applied in two halves, so that results below the normal numbers and close to the largest are right.
FASTEBM_INLINE float lane_exp(float x) {
  float z = x < -104.0f ? -104.0f : x;
  z = z > 89.0f ? 89.0f : z;
  int32_t k;
  const float excess = lane_reduced_exp(z, k);
  const int32_t half = k >> 1;
  const float first = lane_power_of_two(half);
  return fused(first, excess, first) * lane_power_of_two(k - half);
}

// e^x - 1, accurate for small x.
FASTEBM_INLINE float lane_expm1(float x) {
  float z = x < -30.0f ? -30.0f : x;
  z = z > 88.0f ? 88.0f : z;
  int32_t k;
  const float excess = lane_reduced_exp(z, k);
  const float scale = lane_power_of_two(k), value = fused(scale, excess, scale - 1.0f);
  return x > 88.0f ? lane_exp(x) : value;
}

// log(x): x = 2^k m with m in [sqrt(1/2), sqrt(2)), log m by `log_polynomial`.
FASTEBM_INLINE float lane_log(float x) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const bool small = x < 0x1p-126f;
  const float u = small ? x * 0x1p+24f : x;
  const int32_t bits = bits_of(u);
  const int32_t k = (bits - kSqrtHalf) >> 23;
  const float f = float_of(static_cast<int32_t>(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(k) << 23))) - 1.0f;
  const float log1p = fused(f * f, -0.5f * log_polynomial(f), f);
  const float exponent = static_cast<float>(small ? k - 24 : k);
  float result = fused(exponent, 0x1.62e430p-1f, log1p);
  result = x == INFINITY ? x : result;
  result = x == 0.0f ? -INFINITY : result;
  return x < 0.0f || x != x ? NAN : result;
}

// log(1 + x); what rounding 1 + x lost is put back.
FASTEBM_INLINE float lane_log1p(float x) {
  const float u = 1.0f + x, lost = x - (u - 1.0f);
  const float value = lane_log(u) + lost / u;
  return u == 1.0f || u == INFINITY ? (x == x ? x : value) : value;
}

// The quarter turn of x, and the rest: x = n pi/2 + r with |r| <= pi/4. In float64, with pi/2 in two parts: right to the last
// place of float32 up to |x| = 2^30. Beyond that, and for infinities, the rest is NaN rather than wrong.
FASTEBM_INLINE float lane_quarter(float x, int32_t& quadrant) {
  constexpr double kRound = 0x1.8p+52;
  const double wide = static_cast<double>(x);
  const double shifted = fused(wide, 0x1.45f306dc9c883p-1, kRound), n = shifted - kRound;
  const double r = fused(n, -0x1.1a62633145c07p-54, fused(n, -0x1.921fb54442d18p+0, wide));
  quadrant = static_cast<int32_t>(static_cast<float>(n - 4.0 * __builtin_floor(n * 0.25)));
  const float magnitude = x < 0 ? -x : x;
  return magnitude <= 0x1p+30f ? static_cast<float>(r) : NAN;
}

FASTEBM_INLINE float lane_sin_polynomial(float r, float z) {
  float s = 0x1.5dbe2ep-19f;
  s = fused(s, z, -0x1.9f6d5ep-13f);
  s = fused(s, z, 0x1.110f1cp-7f);
  s = fused(s, z, -0x1.555544p-3f);
  return fused(s * z, r, r);
}
FASTEBM_INLINE float lane_cos_polynomial(float z) {
  float c = 0x1.99eb9cp-16f;
  c = fused(c, z, -0x1.6c0c1ap-10f);
  c = fused(c, z, 0x1.55554ap-5f);
  c = fused(c, z, -0.5f);
  return fused(c, z, 1.0f);
}
FASTEBM_INLINE float lane_turned(float x, int32_t turn) {
  int32_t quadrant;
  const float r = lane_quarter(x, quadrant), z = r * r;
  quadrant += turn;
  const float value = (quadrant & 1) ? lane_cos_polynomial(z) : lane_sin_polynomial(r, z);
  return (quadrant & 2) ? -value : value;
}
FASTEBM_INLINE float lane_sin(float x) { return lane_turned(x, 0); }
FASTEBM_INLINE float lane_cos(float x) { return lane_turned(x, 1); }

FASTEBM_INLINE float lane_tanh(float x) {
  const float magnitude = x < 0 ? -x : x, e = exponential_minus_one(-2.0f * magnitude), t = -e / (2.0f + e);
  return x < 0 ? -t : t;
}

FASTEBM_INLINE float lane_sigmoid(float x) {
  const float e = lane_exp(x < 0 ? x : -x), large = 1.0f / (1.0f + e);
  return x < 0 ? e * large : large;
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|).
FASTEBM_INLINE float lane_softplus(float x) {
  const float magnitude = x < 0 ? -x : x;
  return (x > 0 ? x : (x == x ? 0.0f : x)) + lane_log1p(lane_exp(-magnitude));
}

// erf(x): an odd polynomial up to 1, relative error 1.3e-9 with these coefficients; beyond, the tail of the normal distribution.
FASTEBM_INLINE float lane_erf(float x) {
  const float a = x < 0 ? -x : x, z = x * x;
  float p = 0x1.496a1ep-14f;
  p = fused(p, z, -0x1.a3f6f8p-11f);
  p = fused(p, z, 0x1.5405b0p-8f);
  p = fused(p, z, -0x1.b7f90cp-6f);
  p = fused(p, z, 0x1.ce2cf8p-4f);
  p = fused(p, z, -0x1.81273ep-2f);
  p = fused(p, z, 0x1.20dd74p+0f);
  const float bounded_a = a > 6.0f ? 6.0f : a;
  const float tail = fused(-2.0f, gaussian(-0x1.6a09e6p+0f * bounded_a).distribution, 1.0f);
  const float magnitude = a > 1.0f ? tail : a * p;
  return x < 0 ? -magnitude : magnitude;
}

// atan(x): an odd polynomial up to 1, relative error 4e-10; beyond, pi/2 - atan(1/x).
FASTEBM_INLINE float lane_atan(float x) {
  const float a = x < 0 ? -x : x;
  const bool large = a > 1.0f;
  const float r = large ? 1.0f / a : a, z = r * r;
  float p = 0x1.1e077ap-10f;
  p = fused(p, z, -0x1.d7d1ecp-8f);
  p = fused(p, z, 0x1.6cf18ep-6f);
  p = fused(p, z, -0x1.6b607ap-5f);
  p = fused(p, z, 0x1.131782p-4f);
  p = fused(p, z, -0x1.6865d0p-4f);
  p = fused(p, z, 0x1.c4cad8p-4f);
  p = fused(p, z, -0x1.246fecp-3f);
  p = fused(p, z, 0x1.999786p-3f);
  p = fused(p, z, -0x1.555550p-2f);
  const float value = fused(r * z, p, r), turned = large ? 0x1.921fb6p+0f - (value + 0x1.777a5cp-25f) : value;
  return x < 0 ? -turned : turned;
}

FASTEBM_INLINE float lane_atan2(float y, float x) {
  const float ax = x < 0 ? -x : x, ay = y < 0 ? -y : y;
  const bool steep = ay > ax;
  const float low = steep ? ax : ay, high = steep ? ay : ax;
  float value = lane_atan(high == 0.0f ? low : low == high ? 1.0f : low / high);
  value = steep ? 0x1.921fb6p+0f - value : value;
  const bool left = bits_of(x) < 0;
  value = left ? 0x1.921fb6p+1f - value : value;
  value = bits_of(y) < 0 ? -value : value;
  return x != x || y != y ? NAN : value;
}

// x^y: e^(y log |x|), with the sign of an odd power.
FASTEBM_INLINE float lane_pow(float x, float y) {
  const float magnitude = lane_exp(y * lane_log(x < 0 ? -x : x));
  const float whole = __builtin_floorf(y);
  const bool integer = whole == y, odd = integer && __builtin_floorf(whole * 0.5f) * 2.0f != whole;
  float value = x < 0 ? (integer ? (odd ? -magnitude : magnitude) : NAN) : magnitude;
  value = x == 1.0f || y == 0.0f ? 1.0f : value;
  return value;
}

}  // namespace fastebm
