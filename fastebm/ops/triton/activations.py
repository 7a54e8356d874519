"""The activations and their derivatives as Triton device functions, numbered as in fastebm/ops/activations.py.

The block tail's repeat csrc/activations.h step for step. In float32 nothing is approximate: exponentials and logarithms
are polynomials in explicit multiply-adds, and divisions round correctly.

A program that stores bfloat16 rounds to 8 bits what it keeps. There, APPROXIMATE takes the GPU's own instructions,
which are right to 22 bits: `ex2.approx`, whose error is at most 2^-22 of the result, and `rcp.approx`, one unit in the
last place. They flush what is below 2^-126 to zero. Where a difference from 1 counts (tanh, elu), the exponential
remains a polynomial. tests/gpu/test_approximations.py bounds the errors.
"""

from __future__ import annotations

import ctypes
import math

import triton
import triton.language as tl

from ..activations import ACTIVATION_TABLE, SWISH_SCALE
from .philox import INTERPRETED, polynomial

_SILU, _GELU, _GELU_TANH, _ELU, _LEAKY_RELU, _RELU, _SOFTPLUS, _TANH, _SIGMOID, _SQUARE, _EXP = (
    tl.constexpr(number) for number in range(11)
)
_HARDTANH, _HARDSIGMOID, _HARDSWISH, _MISH, _ABS, _SQRT, _RSQRT, _RECIPROCAL, _SCALED_SWISH = (
    tl.constexpr(number) for number in range(11, len(ACTIVATION_TABLE))
)
_PARAMETERS = tl.constexpr(tuple(row.num_parameters for row in ACTIVATION_TABLE))
_INVERSE_SWISH_SCALE = tl.constexpr(1 / SWISH_SCALE)

_LOG2_E, _ROUND = tl.constexpr(float.fromhex("0x1.715476p+0")), tl.constexpr(1.5 * 2**23)
_LOG2_HIGH, _LOG2_LOW = tl.constexpr(float.fromhex("0x1.63p-1")), tl.constexpr(float.fromhex("-0x1.bd0106p-13"))
_EXPONENTIAL = tl.constexpr(
    tuple(float.fromhex(c) for c in ("0x1.6d71dep-10", "0x1.122736p-7", "0x1.5554c8p-5", "0x1.5554b0p-3", "0x1p-1"))
)
_TAIL_COEFFICIENTS = (
    *("-0x1.cb8d38p-6", "0x1.28db8ep-3", "-0x1.186da0p-2", "0x1.8bb554p-3", "-0x1.4e1e86p-5"),
    *("0x1.cfd70ap-4", "0x1.dd9abep-4", "0x1.19b90cp-3", "0x1.18d1b4p-3"),
)
_TAIL = tl.constexpr(tuple(map(float.fromhex, _TAIL_COEFFICIENTS)))
_ARTANH = tl.constexpr(tuple(1 / odd for odd in range(17, 1, -2)))
_ROOT_INVERSE_TWO_PI = tl.constexpr(1 / math.sqrt(2 * math.pi))


def _single(value: float) -> float:
    """The nearest float32."""
    return ctypes.c_float(value).value


# Products of constants are rounded as in C++: in Python's float64 the last bit of derivatives would differ.
_SLOPE, _CUBIC = _single(math.sqrt(8 / math.pi)), _single(0.044715)
_TANH_SLOPE, _TANH_CUBIC, _TANH_THREE_CUBIC = (
    tl.constexpr(_SLOPE),
    tl.constexpr(_CUBIC),
    tl.constexpr(_single(3 * _CUBIC)),
)
_TANH_SLOPE_SIX_CUBIC = tl.constexpr(_single(_single(6 * _SLOPE) * _CUBIC))
_THIRD, _SIXTH = tl.constexpr(_single(1 / 3)), tl.constexpr(_single(1 / 6))
_LOG_TWO = tl.constexpr(float.fromhex("0x1.62e43p-1"))
_INTERPRETED = tl.constexpr(INTERPRETED)
# 2 to this power and its reciprocal are normal numbers.
_MOST_POWER = tl.constexpr(126.0)


@triton.jit
def split_exponential(x: tl.tensor) -> tl.tuple:
    """(scale, excess) for x <= 0: e^x = scale * (1 + excess), scale a power of two."""
    x = tl.where(x < -88.0, -88.0, x)
    shifted = tl.fma(x, _LOG2_E, _ROUND)
    n = shifted - _ROUND
    r = tl.fma(n, -_LOG2_LOW, tl.fma(n, -_LOG2_HIGH, x))
    q = polynomial(r, _EXPONENTIAL, 5)
    exponent = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return exponent.to(tl.float32, bitcast=True), tl.fma(r * r, q, r)


@triton.jit
def power_of_two(x: tl.tensor) -> tl.tensor:
    """About 2^x; the interpreter, which has no instructions of a GPU, rounds it."""
    if _INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x: tl.tensor, APPROXIMATE: tl.constexpr) -> tl.tensor:
    """1 / x."""
    if not APPROXIMATE:
        return tl.div_rn(1.0, x)
    elif _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def quotient(a: tl.tensor, b: tl.tensor, APPROXIMATE: tl.constexpr) -> tl.tensor:
    """a / b, for b of ordinary size where it is approximate."""
    if APPROXIMATE:
        return a * reciprocal(b, True)
    else:
        return tl.div_rn(a, b)


@triton.jit
def exponential(x: tl.tensor, APPROXIMATE: tl.constexpr = False) -> tl.tensor:
    """e^x for x <= 0."""
    if APPROXIMATE:
        return power_of_two(x * _LOG2_E)
    else:
        scale, excess = split_exponential(x)
        return tl.fma(scale, excess, scale)


@triton.jit
def exponential_minus_one(x: tl.tensor) -> tl.tensor:
    """e^x - 1 for x <= 0."""
    scale, excess = split_exponential(x)
    return tl.fma(scale, excess, scale - 1.0)


@triton.jit
def logistic(x: tl.tensor, APPROXIMATE: tl.constexpr = False) -> tl.tuple:
    """The logistic function of x and of -x, both to full relative accuracy."""
    if APPROXIMATE:
        e = power_of_two(tl.minimum(x * -_LOG2_E, _MOST_POWER, propagate_nan=tl.PropagateNan.ALL))
        above = reciprocal(1.0 + e, True)
        return above, e * above
    else:
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
def gaussian(x: tl.tensor, APPROXIMATE: tl.constexpr = False) -> tl.tuple:
    """Distribution function and density of the standard normal."""
    z = bounded(x)
    a = tl.where(z < 0, -z, z)
    square = a * a
    e = exponential(-0.5 * square, APPROXIMATE)
    if not APPROXIMATE:
        lost = tl.fma(a, a, -square)
        e = tl.fma(-0.5 * lost, e, e)
    t = reciprocal(tl.fma(a, 11 / 32, 1.0), APPROXIMATE)
    tail = e * (t * polynomial(t, _TAIL, 9))
    return tl.where(x < 0, tail, 1.0 - tail), e * _ROOT_INVERSE_TWO_PI


@triton.jit
def gelu_tanh(x: tl.tensor, ORDER: tl.constexpr, APPROXIMATE: tl.constexpr = False) -> tl.tensor:
    """x * logistic(w(x)) with w = sqrt(8 / pi) (x + 0.044715 x^3), or a derivative."""
    z = bounded(x)
    square = z * z
    above, below = logistic(z * _TANH_SLOPE * tl.fma(square, _TANH_CUBIC, 1.0), APPROXIMATE)
    w1 = tl.fma(square, _TANH_THREE_CUBIC, 1.0) * _TANH_SLOPE
    density = above * below
    if ORDER == 0:
        return x * above
    elif ORDER == 1:
        return tl.fma(z * w1, density, above)
    else:
        w2 = z * _TANH_SLOPE_SIX_CUBIC
        return density * tl.fma(z, tl.fma((below - above) * w1, w1, w2), 2 * w1)


@triton.jit
def gelu(x: tl.tensor, ORDER: tl.constexpr, APPROXIMATE: tl.constexpr = False) -> tl.tensor:
    """x * distribution(x), or a derivative."""
    distribution, density = gaussian(x, APPROXIMATE)
    z = bounded(x)
    if ORDER == 0:
        return x * distribution
    elif ORDER == 1:
        return tl.fma(z, density, distribution)
    else:
        return density * tl.fma(-z, z, 2.0)


@triton.jit
def silu(x: tl.tensor, ORDER: tl.constexpr, APPROXIMATE: tl.constexpr = False) -> tl.tensor:
    """x * logistic(x), or a derivative."""
    above, below = logistic(x, APPROXIMATE)
    density = above * below
    if ORDER == 0:
        return x * above
    elif ORDER == 1 and APPROXIMATE:
        return tl.fma(x * above, below, above)  # which shares a product with the activation itself
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


# Fused programs: their activations have up to three parameters, which are read from the program's numbers.


@triton.jit
def twice_artanh(s: tl.tensor) -> tl.tensor:
    """2 artanh(s) for |s| <= 1/3, by its series to s^17: the first term left out is below 1e-9 of it."""
    square = s * s
    double = s + s
    return tl.fma(double * square, polynomial(square, _ARTANH, 8), double)


@triton.jit
def log_of_one_plus(e: tl.tensor, APPROXIMATE: tl.constexpr = False) -> tl.tensor:
    """log(1 + e) for e in [0, 1]: with s = e / (2 + e), (1 + s) / (1 - s) is 1 + e."""
    return twice_artanh(quotient(e, 2.0 + e, APPROXIMATE))


@triton.jit
def logarithm(x: tl.tensor) -> tl.tensor:
    """log(x) for finite x >= 1."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return tl.fma(exponent.to(tl.float32), _LOG_TWO, log_of_one_plus(mantissa - 1.0))


@triton.jit
def exponential_of(x: tl.tensor, APPROXIMATE: tl.constexpr) -> tl.tensor:
    """e^x for any x."""
    if APPROXIMATE:
        return power_of_two(x * _LOG2_E)
    else:
        e = exponential(tl.where(x < 0, x, -x))
        return tl.where(x < 0, e, tl.div_rn(1.0, e))


@triton.jit
def hyperbolic_tangent(x: tl.tensor, APPROXIMATE: tl.constexpr) -> tl.tensor:
    """tanh(x), accurate near zero as well."""
    e = exponential_minus_one(-2.0 * tl.where(x < 0, -x, x))
    t = quotient(-e, 2.0 + e, APPROXIMATE)
    return tl.where(x < 0, -t, t)


@triton.jit
def gate_to_six(x: tl.tensor) -> tl.tensor:
    """x + 3 within [0, 6]."""
    above = tl.where(x + 3.0 < 0, 0.0, x + 3.0)
    return tl.where(above > 6, 6.0, above)


@triton.jit
def mish_weight(x: tl.tensor) -> tl.tuple:
    """tanh(log(1 + e^x)), and the logistic function of x."""
    t = exponential(tl.where(x < 0, x, -x))
    two = 2.0 * t
    above = 1.0 + two
    below = tl.fma(t, t, two)
    of = tl.div_rn(tl.where(x < 0, t, 1.0), 1.0 + t)
    return tl.div_rn(tl.where(x < 0, below, above), tl.where(x < 0, below + 2.0, tl.fma(two, t, above))), of


@triton.jit
def parameters(numbers: tl.tensor, at: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tuple:
    """The three parameters of an activation, zero where it has fewer."""
    a, b, c = 0.0, 0.0, 0.0
    if _PARAMETERS[ACTIVATION] > 0:
        a = tl.load(numbers + at)
    if _PARAMETERS[ACTIVATION] > 1:
        b = tl.load(numbers + at + 1)
    if _PARAMETERS[ACTIVATION] > 2:
        c = tl.load(numbers + at + 2)
    return a, b, c


@triton.jit
def activate(
    x: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    ACTIVATION: tl.constexpr,
    APPROXIMATE: tl.constexpr,
) -> tl.tensor:
    """The activation at float32 x."""
    if ACTIVATION == _SILU:
        return silu(x, 0, APPROXIMATE)
    elif ACTIVATION == _GELU:
        return gelu(x, 0, APPROXIMATE)
    elif ACTIVATION == _GELU_TANH:
        return gelu_tanh(x, 0, APPROXIMATE)
    elif ACTIVATION == _ELU:
        return b * tl.where(x > 0, x, a * exponential_minus_one(tl.where(x > 0, 0.0, c * x)))
    elif ACTIVATION == _LEAKY_RELU:
        return tl.where(x > 0, x, a * x)
    elif ACTIVATION == _RELU:
        return tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == _SOFTPLUS:
        z = a * x
        e = exponential(tl.where(z < 0, z, -z), APPROXIMATE)
        smooth = log_of_one_plus(e, APPROXIMATE) + tl.where(z < 0, 0.0, z)
        return tl.where(z > b, x, quotient(smooth, a + tl.zeros_like(x), APPROXIMATE))
    elif ACTIVATION == _TANH:
        return hyperbolic_tangent(x, APPROXIMATE)
    elif ACTIVATION == _SIGMOID:
        of, _ = logistic(x, APPROXIMATE)
        return of
    elif ACTIVATION == _SQUARE:
        return x * x
    elif ACTIVATION == _HARDTANH:
        above = tl.where(x < a, a, x)
        return tl.where(above > b, b, above)
    elif ACTIVATION == _HARDSIGMOID:
        return gate_to_six(x) * _SIXTH
    elif ACTIVATION == _HARDSWISH:
        return x * gate_to_six(x) * _SIXTH
    elif ACTIVATION == _MISH:
        weight, _ = mish_weight(x)
        return x * weight
    elif ACTIVATION == _ABS:
        return tl.where(x < 0, -x, x)
    elif ACTIVATION == _SQRT:
        return tl.sqrt_rn(x)
    elif ACTIVATION == _RSQRT:
        return tl.div_rn(1.0, tl.sqrt_rn(x))
    elif ACTIVATION == _RECIPROCAL:
        return tl.div_rn(1.0, x)
    else:
        return exponential_of(x, APPROXIMATE)


@triton.jit
def derivative(
    h: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    ACTIVATION: tl.constexpr,
    OF_RESULT: tl.constexpr,
    APPROXIMATE: tl.constexpr,
) -> tl.tensor:
    """The activation's derivative at h, or OF_RESULT where it is h. At a kink the one from below."""
    if ACTIVATION == _SILU:
        return silu(h, 1, APPROXIMATE)
    elif ACTIVATION == _GELU:
        return gelu(h, 1, APPROXIMATE)
    elif ACTIVATION == _GELU_TANH:
        return gelu_tanh(h, 1, APPROXIMATE)
    elif ACTIVATION == _ELU:
        if OF_RESULT:
            return tl.where(h > 0, b, c * (h + a * b))
        else:
            return tl.where(h > 0, b, a * b * c * exponential(tl.where(h > 0, 0.0, c * h), APPROXIMATE))
    elif ACTIVATION == _LEAKY_RELU:
        return tl.where(h > 0, 1.0, a)
    elif ACTIVATION == _RELU:
        return tl.where(h > 0, 1.0, 0.0)
    elif ACTIVATION == _SOFTPLUS:
        z = a * h
        of, _ = logistic(z, APPROXIMATE)
        return tl.where(z > b, 1.0, of)
    elif ACTIVATION == _TANH:
        t = h if OF_RESULT else hyperbolic_tangent(h, APPROXIMATE)
        return tl.fma(-t, t, 1.0)
    elif ACTIVATION == _SIGMOID:
        if OF_RESULT:
            return h * (1.0 - h)
        else:
            of, of_minus = logistic(h, APPROXIMATE)
            return of * of_minus
    elif ACTIVATION == _SQUARE:
        return 2.0 * h
    elif ACTIVATION == _HARDTANH:
        edge = tl.where((h < a) | (h > b), 0.0, 0.0 if OF_RESULT else c)
        return tl.where((h > a) & (h < b), 1.0, edge)
    elif ACTIVATION == _HARDSIGMOID:
        return tl.where((h > -3) & (h < 3), _SIXTH, 0.0)
    elif ACTIVATION == _HARDSWISH:
        return tl.where(h < -3, 0.0, tl.where(h > 3, 1.0, tl.fma(h, _THIRD, 0.5)))
    elif ACTIVATION == _MISH:
        weight, of = mish_weight(h)
        return tl.fma(h * of, tl.fma(-weight, weight, 1.0), weight)
    elif ACTIVATION == _ABS:
        return tl.where(h > 0, 1.0, tl.where(h < 0, -1.0, 0.0))
    elif ACTIVATION == _SQRT:
        return tl.div_rn(0.5, h if OF_RESULT else tl.sqrt_rn(h))
    elif ACTIVATION == _RSQRT:
        r = h if OF_RESULT else tl.div_rn(1.0, tl.sqrt_rn(h))
        return -0.5 * r * (r * r)
    elif ACTIVATION == _RECIPROCAL:
        r = h if OF_RESULT else tl.div_rn(1.0, h)
        return -r * r
    else:
        return h if OF_RESULT else exponential_of(h, APPROXIMATE)
