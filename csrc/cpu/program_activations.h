// The activations of fused programs and their derivatives.
// Part of program_variant.h, which compiles it once for each instruction set.
#pragma once

#include "program_vectors.h"

// 1 / (1 + e^-x) to 2e-7, finite for every finite x. Eight multiply-adds and, with AVX-512, a refined estimate for the division.
static FASTEBM_INLINE float power_of_two(float t) {  // |t| <= 126
  const float shifted = t + 0x1.8p+23f, f = t - (shifted - 0x1.8p+23f);
  float p = 1.5403530e-4f;  // log(2)^k / k!, k = 6 ... 0
  p = fused(p, f, 1.3333558e-3f);
  p = fused(p, f, 9.6181291e-3f);
  p = fused(p, f, 5.5504109e-2f);
  p = fused(p, f, 2.4022651e-1f);
  p = fused(p, f, 6.9314718e-1f);
  p = fused(p, f, 1.0f);
  return float_of(bits_of(p) + static_cast<int32_t>(static_cast<uint32_t>(bits_of(shifted)) << 23));
}

static FASTEBM_INLINE float sigmoid(float x) {
  float t = x * -0x1.715476p+0f;
  t = t < -126.0f ? -126.0f : t;
  t = t > 126.0f ? 126.0f : t;
  return 1.0f / (1.0f + power_of_two(t));
}

static FASTEBM_INLINE float hyperbolic_tangent(float x) {
  const float e = exponential_minus_one(x < 0 ? 2 * x : -2 * x), t = -e / (2 + e);
  return x < 0 ? -t : t;
}

static FASTEBM_INLINE float exponential_of(float x) {
  const float e = exponential(x < 0 ? x : -x);
  return x < 0 ? e : 1 / e;
}

// tanh(log(1 + e^x)), and the logistic function of x.
static FASTEBM_INLINE float mish_weight(float x, float& logistic_of) {
  const float t = exponential(x < 0 ? x : -x), two = 2 * t, above = 1 + two, below = fused(t, t, two);
  logistic_of = (x < 0 ? t : 1.0f) / (1 + t);
  return (x < 0 ? below : above) / (x < 0 ? below + 2 : fused(two, t, above));
}

template <Activation kind>
static FASTEBM_INLINE float activation_at(float x, const float* a) {
  if constexpr (kind == Activation::silu) return x * sigmoid(x);
  if constexpr (kind == Activation::gelu) return activated<Activation::gelu, 0>(x, 0.0f);
  if constexpr (kind == Activation::gelu_tanh) return activated<Activation::gelu_tanh, 0>(x, 0.0f);
  if constexpr (kind == Activation::elu) return a[1] * (x > 0 ? x : a[0] * exponential_minus_one(x > 0 ? 0.0f : a[2] * x));
  if constexpr (kind == Activation::leaky_relu) return x > 0 ? x : a[0] * x;
  if constexpr (kind == Activation::relu) return x <= 0 ? 0.0f : x;
  if constexpr (kind == Activation::softplus) return a[0] * x > a[1] ? x : __builtin_log1pf(__builtin_expf(a[0] * x)) / a[0];
  if constexpr (kind == Activation::tanh) return hyperbolic_tangent(x);
  if constexpr (kind == Activation::sigmoid) return sigmoid(x);
  if constexpr (kind == Activation::square) return x * x;
  if constexpr (kind == Activation::hardtanh) {
    const float above = x < a[0] ? a[0] : x;
    return above > a[1] ? a[1] : above;
  }
  if constexpr (kind == Activation::hardsigmoid || kind == Activation::hardswish) {
    const float shifted = x + 3.0f, above = shifted < 0 ? 0.0f : shifted, gate = above > 6 ? 6.0f : above;
    return (kind == Activation::hardswish ? x * gate : gate) * (1.0f / 6.0f);
  }
  if constexpr (kind == Activation::mish) {
    float s;
    return x * mish_weight(x, s);
  }
  if constexpr (kind == Activation::abs) return x < 0 ? -x : x;
  if constexpr (kind == Activation::sqrt) return rounded_sqrt(x);
  if constexpr (kind == Activation::rsqrt) return 1.0f / rounded_sqrt(x);
  if constexpr (kind == Activation::reciprocal) return 1.0f / x;
  return exponential_of(x);
}

// f'(h), where `of_result` means that h is f(x).
template <Activation kind>
static FASTEBM_INLINE float derivative_at(float h, const float* a, bool of_result) {
  if constexpr (kind == Activation::silu) {
    const float s = sigmoid(h);
    return fused(h * s, 1.0f - s, s);
  }
  if constexpr (kind == Activation::gelu) return activated<Activation::gelu, 1>(h, 0.0f);
  if constexpr (kind == Activation::gelu_tanh) return activated<Activation::gelu_tanh, 1>(h, 0.0f);
  if constexpr (kind == Activation::elu) {
    const float below = of_result ? a[2] * (h + a[0] * a[1]) : a[0] * a[1] * a[2] * exponential(h > 0 ? 0.0f : a[2] * h);
    return h > 0 ? a[1] : below;
  }
  if constexpr (kind == Activation::leaky_relu) return h > 0 ? 1.0f : a[0];
  if constexpr (kind == Activation::relu) return h > 0 ? 1.0f : 0.0f;
  if constexpr (kind == Activation::softplus) return a[0] * h > a[1] ? 1.0f : sigmoid(a[0] * h);
  if constexpr (kind == Activation::tanh) {
    const float t = of_result ? h : hyperbolic_tangent(h);
    return fused(-t, t, 1.0f);
  }
  if constexpr (kind == Activation::sigmoid) {
    const float s = of_result ? h : sigmoid(h);
    return s * (1.0f - s);
  }
  if constexpr (kind == Activation::square) return 2 * h;
  if constexpr (kind == Activation::hardtanh) {
    const float outside = h < a[0] || h > a[1] ? 0.0f : a[2];
    return h > a[0] && h < a[1] ? 1.0f : (of_result ? 0.0f : outside);
  }
  if constexpr (kind == Activation::hardsigmoid) return h > -3 && h < 3 ? 1.0f / 6.0f : 0.0f;
  if constexpr (kind == Activation::hardswish) return h < -3 ? 0.0f : h > 3 ? 1.0f : fused(h, 1.0f / 3.0f, 0.5f);
  if constexpr (kind == Activation::mish) {
    float s;
    const float w = mish_weight(h, s);
    return fused(h * s, fused(-w, w, 1.0f), w);
  }
  if constexpr (kind == Activation::abs) return h > 0 ? 1.0f : h < 0 ? -1.0f : 0.0f;
  if constexpr (kind == Activation::sqrt) return 0.5f / (of_result ? h : rounded_sqrt(h));
  if constexpr (kind == Activation::rsqrt) {
    const float r = of_result ? h : 1.0f / rounded_sqrt(h);
    return -0.5f * r * (r * r);
  }
  if constexpr (kind == Activation::reciprocal) {
    const float r = of_result ? h : 1.0f / h;
    return -r * r;
  }
  return of_result ? h : exponential_of(h);
}

#define FASTEBM_EACH_ACTIVATION(CALL)                                             \
  switch (step.activation) {                                                      \
    case Activation::silu: return CALL<Activation::silu> ARGUMENTS;               \
    case Activation::gelu: return CALL<Activation::gelu> ARGUMENTS;               \
    case Activation::gelu_tanh: return CALL<Activation::gelu_tanh> ARGUMENTS;     \
    case Activation::elu: return CALL<Activation::elu> ARGUMENTS;                 \
    case Activation::leaky_relu: return CALL<Activation::leaky_relu> ARGUMENTS;   \
    case Activation::relu: return CALL<Activation::relu> ARGUMENTS;               \
    case Activation::softplus: return CALL<Activation::softplus> ARGUMENTS;       \
    case Activation::tanh: return CALL<Activation::tanh> ARGUMENTS;               \
    case Activation::sigmoid: return CALL<Activation::sigmoid> ARGUMENTS;         \
    case Activation::square: return CALL<Activation::square> ARGUMENTS;           \
    case Activation::hardtanh: return CALL<Activation::hardtanh> ARGUMENTS;       \
    case Activation::hardsigmoid: return CALL<Activation::hardsigmoid> ARGUMENTS; \
    case Activation::hardswish: return CALL<Activation::hardswish> ARGUMENTS;     \
    case Activation::mish: return CALL<Activation::mish> ARGUMENTS;               \
    case Activation::abs: return CALL<Activation::abs> ARGUMENTS;                 \
    case Activation::sqrt: return CALL<Activation::sqrt> ARGUMENTS;               \
    case Activation::rsqrt: return CALL<Activation::rsqrt> ARGUMENTS;             \
    case Activation::reciprocal: return CALL<Activation::reciprocal> ARGUMENTS;   \
    default: return CALL<Activation::exp> ARGUMENTS;                              \
  }

#if FASTEBM_VECTOR == 16
// 1 / (1 + e^-x) as `sigmoid` below has it, with an estimate refined once in the place of the division.
static FASTEBM_INLINE __m512 sigmoid_vector(__m512 x) {
  __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(-0x1.715476p+0f));
  t = _mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_min_ps(_mm512_set1_ps(126.0f), t));  // NaN, the second operand, stays
  const __m512 n = _mm512_roundscale_ps(t, 0), f = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  const __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, n)), r = _mm512_rcp14_ps(d);
  return _mm512_mul_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(2.0f)));
}

// f(h) in the place of h, and f'(h).
static FASTEBM_INLINE __m512 silu_vector(__m512& h) {
  const __m512 s = sigmoid_vector(h);
  h = _mm512_mul_ps(h, s);
  return _mm512_fmadd_ps(h, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
}
#endif
