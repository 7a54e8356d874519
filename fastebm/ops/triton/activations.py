"""The activations and their two derivatives as Triton device functions: csrc/activations.h, step for step."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..activations import ACTIVATIONS, SWISH_SCALE

_SCALED_SWISH, _SILU, _GELU, _GELU_TANH, _ELU, _LEAKY_RELU = (tl.constexpr(i) for i in range(len(ACTIVATIONS) - 1))
_INVERSE_SWISH_SCALE = tl.constexpr(1 / SWISH_SCALE)

_LOG2_E, _ROUND = tl.constexpr(float.fromhex("0x1.715476p+0")), tl.constexpr(1.5 * 2**23)
_LOG2_HIGH, _LOG2_LOW = tl.constexpr(float.fromhex("0x1.63p-1")), tl.constexpr(float.fromhex("-0x1.bd0106p-13"))
_EXP4, _EXP3, _EXP2, _EXP1 = (
    tl.constexpr(float.fromhex(c)) for c in ("0x1.6d71dep-10", "0x1.122736p-7", "0x1.5554c8p-5", "0x1.5554b0p-3")
)
_TAIL8, _TAIL7, _TAIL6, _TAIL5, _TAIL4, _TAIL3, _TAIL2, _TAIL1, _TAIL0 = (
    tl.constexpr(float.fromhex(c))
    for c in (
        *("-0x1.cb8d38p-6", "0x1.28db8ep-3", "-0x1.186da0p-2", "0x1.8bb554p-3", "-0x1.4e1e86p-5"),
        *("0x1.cfd70ap-4", "0x1.dd9abep-4", "0x1.19b90cp-3", "0x1.18d1b4p-3"),
    )
)
_ROOT_INVERSE_TWO_PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
_TANH_SLOPE, _TANH_CUBIC = tl.constexpr(math.sqrt(8 / math.pi)), tl.constexpr(0.044715)


@triton.jit
def split_exponential(x: tl.tensor) -> tl.tuple:
    """(scale, excess) for x <= 0: e^x = scale * (1 + excess), scale a power of two."""
    x = tl.where(x < -88.0, -88.0, x)
    shifted = tl.fma(x, _LOG2_E, _ROUND)
    n = shifted - _ROUND
    r = tl.fma(n, -_LOG2_LOW, tl.fma(n, -_LOG2_HIGH, x))
    q = tl.fma(r, _EXP4, _EXP3)
    q = tl.fma(q, r, _EXP2)
    q = tl.fma(q, r, _EXP1)
    q = tl.fma(q, r, 0.5)
    exponent = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return exponent.to(tl.float32, bitcast=True), tl.fma(r * r, q, r)


@triton.jit
def exponential(x: tl.tensor) -> tl.tensor:
    """e^x for x <= 0."""
    scale, excess = split_exponential(x)
    return tl.fma(scale, excess, scale)


@triton.jit
def exponential_minus_one(x: tl.tensor) -> tl.tensor:
    """e^x - 1 for x <= 0."""
    scale, excess = split_exponential(x)
    return tl.fma(scale, excess, scale - 1.0)


@triton.jit
def logistic(x: tl.tensor) -> tl.tuple:
    """The logistic function of x and of -x, both to full relative accuracy."""
    e = exponential(tl.where(x < 0, x, -x))
    large = tl.div_rn(1.0, 1.0 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def bounded(x: tl.tensor) -> tl.tensor:
    """x within [-40, 40], beyond which every density here is 0: squares and cubes stay finite. NaN passes."""
    x = tl.where(x < -40.0, -40.0, x)
    return tl.where(x > 40.0, 40.0, x)


@triton.jit
def gaussian(x: tl.tensor) -> tl.tuple:
    """Distribution function and density of the standard normal."""
    z = bounded(x)
    a = tl.where(z < 0, -z, z)
    square = a * a
    lost = tl.fma(a, a, -square)
    e = exponential(-0.5 * square)
    e = tl.fma(-0.5 * lost, e, e)
    t = tl.div_rn(1.0, tl.fma(a, 11 / 32, 1.0))
    m = tl.fma(t, _TAIL8, _TAIL7)
    m = tl.fma(m, t, _TAIL6)
    m = tl.fma(m, t, _TAIL5)
    m = tl.fma(m, t, _TAIL4)
    m = tl.fma(m, t, _TAIL3)
    m = tl.fma(m, t, _TAIL2)
    m = tl.fma(m, t, _TAIL1)
    m = tl.fma(m, t, _TAIL0)
    tail = e * (t * m)
    return tl.where(x < 0, tail, 1.0 - tail), e * _ROOT_INVERSE_TWO_PI


@triton.jit
def gelu_tanh(x: tl.tensor, ORDER: tl.constexpr) -> tl.tensor:
    """x * logistic(w(x)) with w = sqrt(8 / pi) (x + 0.044715 x^3), or a derivative."""
    z = bounded(x)
    square = z * z
    above, below = logistic(z * _TANH_SLOPE * tl.fma(square, _TANH_CUBIC, 1.0))
    w1 = tl.fma(square, 3 * _TANH_CUBIC, 1.0) * _TANH_SLOPE
    density = above * below
    if ORDER == 0:
        return x * above
    elif ORDER == 1:
        return tl.fma(z * w1, density, above)
    else:
        w2 = z * (_TANH_SLOPE * 6 * _TANH_CUBIC)
        return density * tl.fma(z, tl.fma((below - above) * w1, w1, w2), 2 * w1)


@triton.jit
def gelu(x: tl.tensor, ORDER: tl.constexpr) -> tl.tensor:
    """x * distribution(x), or a derivative."""
    distribution, density = gaussian(x)
    z = bounded(x)
    if ORDER == 0:
        return x * distribution
    elif ORDER == 1:
        return tl.fma(z, density, distribution)
    else:
        return density * tl.fma(-z, z, 2.0)


@triton.jit
def silu(x: tl.tensor, ORDER: tl.constexpr) -> tl.tensor:
    """x * logistic(x), or a derivative."""
    above, below = logistic(x)
    density = above * below
    if ORDER == 0:
        return x * above
    elif ORDER == 1:
        return tl.fma(x, density, above)
    else:
        return density * tl.fma(x, below - above, 2.0)


@triton.jit
def elu(x: tl.tensor, alpha: tl.tensor, ORDER: tl.constexpr) -> tl.tensor:
    """x, below 0 alpha * (e^x - 1), or a derivative."""
    negative = tl.where(x > 0, 0.0, x)
    if ORDER == 0:
        return tl.where(x > 0, x, alpha * exponential_minus_one(negative))
    else:
        return tl.where(x > 0, 1.0 if ORDER == 1 else 0.0, alpha * exponential(negative))


@triton.jit
def piecewise_linear(x: tl.tensor, negative_slope: tl.tensor, LEAKY: tl.constexpr, ORDER: tl.constexpr) -> tl.tensor:
    """Leaky ReLU or ReLU, or a derivative."""
    if ORDER == 2:
        return tl.zeros_like(x)
    elif ORDER == 1:
        return tl.where(x > 0, 1.0, negative_slope if LEAKY else 0.0)
    elif LEAKY:
        return tl.where(x > 0, x, negative_slope * x)
    else:
        return tl.where(x <= 0, 0.0, x)


@triton.jit
def activated(x: tl.tensor, parameter: tl.tensor, ACTIVATION: tl.constexpr, ORDER: tl.constexpr) -> tl.tensor:
    """The activation of that number (ORDER 0) at float32 x, its first (1) or second (2) derivative."""
    if ACTIVATION == _SCALED_SWISH:
        return silu(x, ORDER) * _INVERSE_SWISH_SCALE
    elif ACTIVATION == _SILU:
        return silu(x, ORDER)
    elif ACTIVATION == _GELU:
        return gelu(x, ORDER)
    elif ACTIVATION == _GELU_TANH:
        return gelu_tanh(x, ORDER)
    elif ACTIVATION == _ELU:
        return elu(x, parameter, ORDER)
    else:
        return piecewise_linear(x, parameter, ACTIVATION == _LEAKY_RELU, ORDER)
