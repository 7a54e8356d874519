// The activations that fused operators know, with first and second derivatives, shared by the host compiler and nvcc.
//
// Float32 runs on polynomials in explicit fused multiply-adds, without calls and without branches: loops over it
// vectorise, and every instruction set and a GPU give the same bits (fastebm/ops/triton/activations.py repeats them).
// Measured against float64 on [-20, 20]: values within 2 ulp of |x| (within 6 of the value itself, gelu's tails
// included, but for the tail of gelu_tanh), derivatives within 3 ulp of 1. Float64 is the host's alone and goes through
// the standard library. NaN stays NaN; nothing overflows for finite x.
#pragma once

#include "normal.h"

namespace fastebm {

// Numbered as in fastebm/ops/activations.py. Those from softplus to reciprocal are for fused programs only, scaled_swish for the
// block tail only.
enum class Activation : int64_t {
  silu,
  gelu,
  gelu_tanh,
  elu,
  leaky_relu,
  relu,
  softplus,
  tanh,
  sigmoid,
  square,
  exp,
  hardtanh,
  hardsigmoid,
  hardswish,
  mish,
  abs,
  sqrt,
  rsqrt,
  reciprocal,
  scaled_swish
};

// x = n log 2 + r with |r| <= log(2) / 2; e^x = scale (1 + excess), where scale = 2^n and excess = e^r - 1 = r + r^2 q(r),
// q minimax of degree 4, relative error 1.4e-8. For x <= 0; below -87.7 scale is 0.
struct SplitExponential {
  float scale, excess;
};

FASTEBM_INLINE SplitExponential split_exponential(float x) {
  constexpr float kRound = 0x1.8p+23f;  // adding it rounds to an integer, which is then in the low bits
  x = x < -88.0f ? -88.0f : x;
  const float shifted = fused(x, 0x1.715476p+0f, kRound);
  const float n = shifted - kRound;
  const float r = fused(n, 0x1.bd0106p-13f, fused(n, -0x1.63p-1f, x));  // the first product is exact
  float q = 0x1.6d71dep-10f;
  q = fused(q, r, 0x1.122736p-7f);
  q = fused(q, r, 0x1.5554c8p-5f);
  q = fused(q, r, 0x1.5554b0p-3f);
  q = fused(q, r, 0.5f);
  const uint32_t exponent = (static_cast<uint32_t>(bits_of(shifted)) << 23) + 0x3f800000u;
  return {float_of(static_cast<int32_t>(exponent)), fused(r * r, q, r)};
}

// e^x and e^x - 1 for x <= 0.
FASTEBM_INLINE float exponential(float x) {
  const SplitExponential e = split_exponential(x);
  return fused(e.scale, e.excess, e.scale);
}
FASTEBM_INLINE float exponential_minus_one(float x) {
  const SplitExponential e = split_exponential(x);
  return fused(e.scale, e.excess, e.scale - 1.0f);
}
FASTEBM_INLINE double exponential(double x) { return std::exp(x); }
FASTEBM_INLINE double exponential_minus_one(double x) { return std::expm1(x); }

// The logistic function of x and of -x, both to full relative accuracy.
template <class C>
struct Logistic {
  C of, of_minus;
};

template <class C>
FASTEBM_INLINE Logistic<C> logistic(C x) {
  const C e = exponential(x < 0 ? x : -x);
  const C large = 1 / (1 + e), small = e * large;
  return {x < 0 ? small : large, x < 0 ? large : small};
}

// Beyond 40 every density here is 0; the bound keeps squares and cubes finite.
template <class C>
FASTEBM_INLINE C bounded(C x) {
  x = x < -40 ? C(-40) : x;
  return x > 40 ? C(40) : x;
}

// Distribution function and density of the standard normal.
template <class C>
struct Gaussian {
  C distribution, density;
};

// The tail beyond a >= 0 is e^(-a^2/2) m(t), t = 1 / (1 + 11/32 a), with m(t) = t times a polynomial of degree 8, relative
// error 4e-8 with these coefficients. The part of a^2 that rounding loses is put back, so that far tails keep their
// relative accuracy.
FASTEBM_INLINE Gaussian<float> gaussian(float x) {
  const float z = bounded(x), a = z < 0 ? -z : z;
  const float square = a * a, lost = fused(a, a, -square);
  float e = exponential(-0.5f * square);
  e = fused(-0.5f * lost, e, e);
  const float t = 1.0f / fused(a, 0x1.6p-2f, 1.0f);
  float m = -0x1.cb8d38p-6f;
  m = fused(m, t, 0x1.28db8ep-3f);
  m = fused(m, t, -0x1.186da0p-2f);
  m = fused(m, t, 0x1.8bb554p-3f);
  m = fused(m, t, -0x1.4e1e86p-5f);
  m = fused(m, t, 0x1.cfd70ap-4f);
  m = fused(m, t, 0x1.dd9abep-4f);
  m = fused(m, t, 0x1.19b90cp-3f);
  m = fused(m, t, 0x1.18d1b4p-3f);
  const float tail = e * (t * m);
  return {x < 0 ? tail : 1.0f - tail, e * 0x1.988454p-2f};
}
FASTEBM_INLINE Gaussian<double> gaussian(double x) {
  return {0.5 * std::erfc(x * -0x1.6a09e667f3bcdp-1), std::exp(-0.5 * x * x) * 0x1.9884533d43651p-2};
}

// gelu_tanh is x * logistic(w(x)) with w = sqrt(8 / pi) (x + 0.044715 x^3), which is 0.5 x (1 + tanh(w / 2)).
template <class C, int order>
FASTEBM_INLINE C gelu_tanh(C x) {
  constexpr C kSlope = C(0x1.9884533d43651p+0), kCubic = C(0.044715);
  const C z = bounded(x), square = z * z;
  const Logistic<C> s = logistic(kSlope * z * fused(kCubic, square, C(1)));
  if constexpr (order == 0) return x * s.of;
  const C w1 = kSlope * fused(3 * kCubic, square, C(1)), w2 = kSlope * 6 * kCubic * z, density = s.of * s.of_minus;
  if constexpr (order == 1) return fused(z * w1, density, s.of);
  return density * fused(z, fused((s.of_minus - s.of) * w1, w1, w2), 2 * w1);
}

template <class C, int order>
FASTEBM_INLINE C gelu(C x) {
  const Gaussian<C> g = gaussian(x);
  if constexpr (order == 0) return x * g.distribution;
  const C z = bounded(x);
  if constexpr (order == 1) return fused(z, g.density, g.distribution);
  return g.density * fused(-z, z, C(2));
}

template <class C, int order>
FASTEBM_INLINE C silu(C x) {
  const Logistic<C> s = logistic(x);
  if constexpr (order == 0) return x * s.of;
  const C density = s.of * s.of_minus;
  if constexpr (order == 1) return fused(x, density, s.of);
  return density * fused(x, s.of_minus - s.of, C(2));
}

template <class C, int order>
FASTEBM_INLINE C elu(C x, C alpha) {
  const C below = x > 0 ? C(0) : x;
  if constexpr (order == 0) return x > 0 ? x : alpha * exponential_minus_one(below);
  return x > 0 ? C(order == 1) : alpha * exponential(below);
}

template <class C, int order>
FASTEBM_INLINE C leaky_relu(C x, C negative_slope) {
  if constexpr (order == 0) return x > 0 ? x : negative_slope * x;
  if constexpr (order == 1) return x > 0 ? C(1) : negative_slope;
  return 0;
}

template <class C, int order>
FASTEBM_INLINE C relu(C x) {
  if constexpr (order == 0) return x <= 0 ? C(0) : x;
  return C(order == 1 && x > 0);
}

// The activation (order 0) at x, its first (1) or second (2) derivative. At a kink the derivatives are those from below.
template <Activation kind, int order, class C>
FASTEBM_INLINE C activated(C x, C parameter) {
  if constexpr (kind == Activation::scaled_swish) return silu<C, order>(x) * C(1 / 1.1);
  if constexpr (kind == Activation::silu) return silu<C, order>(x);
  if constexpr (kind == Activation::gelu) return gelu<C, order>(x);
  if constexpr (kind == Activation::gelu_tanh) return gelu_tanh<C, order>(x);
  if constexpr (kind == Activation::elu) return elu<C, order>(x, parameter);
  if constexpr (kind == Activation::leaky_relu) return leaky_relu<C, order>(x, parameter);
  if constexpr (kind == Activation::relu) return relu<C, order>(x);
}

}  // namespace fastebm
