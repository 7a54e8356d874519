"""The activations of fused programs and their derivatives as Triton device functions, numbered as `instructions.KINDS`.

Nothing here is approximate: exponentials and logarithms are polynomials in explicit multiply-adds, as everywhere in the
house, and divisions round correctly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..instructions import KINDS
from .activations import exponential, exponential_minus_one, gelu, gelu_tanh, logistic, silu

_SILU, _GELU, _GELU_TANH, _ELU, _LEAKY_RELU, _RELU, _SOFTPLUS, _TANH, _SIGMOID, _SQUARE, _EXP = (
    tl.constexpr(number) for number in range(len(KINDS))
)
# How many numbers each kind has among the constants.
_PARAMETERS = tl.constexpr(tuple({"elu": 3, "leaky_relu": 1, "softplus": 2}.get(kind, 0) for kind in KINDS))
_LOG_TWO = tl.constexpr(float.fromhex("0x1.62e43p-1"))


@triton.jit
def twice_artanh(s: tl.tensor) -> tl.tensor:
    """2 artanh(s) for |s| <= 1/3, by its series to s^17: the first term left out is below 1e-9 of it."""
    square = s * s
    p = tl.fma(square, 1 / 17, 1 / 15)
    p = tl.fma(p, square, 1 / 13)
    p = tl.fma(p, square, 1 / 11)
    p = tl.fma(p, square, 1 / 9)
    p = tl.fma(p, square, 1 / 7)
    p = tl.fma(p, square, 1 / 5)
    p = tl.fma(p, square, 1 / 3)
    double = s + s
    return tl.fma(double * square, p, double)


@triton.jit
def log_of_one_plus(e: tl.tensor) -> tl.tensor:
    """log(1 + e) for e in [0, 1]: with s = e / (2 + e), (1 + s) / (1 - s) is 1 + e."""
    return twice_artanh(tl.div_rn(e, 2.0 + e))


@triton.jit
def logarithm(x: tl.tensor) -> tl.tensor:
    """log(x) for finite x >= 1."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return tl.fma(exponent.to(tl.float32), _LOG_TWO, log_of_one_plus(mantissa - 1.0))


@triton.jit
def exponential_of(x: tl.tensor) -> tl.tensor:
    """e^x for any x."""
    e = exponential(tl.where(x < 0, x, -x))
    return tl.where(x < 0, e, tl.div_rn(1.0, e))


@triton.jit
def hyperbolic_tangent(x: tl.tensor) -> tl.tensor:
    """tanh(x), accurate near zero as well."""
    e = exponential_minus_one(-2.0 * tl.where(x < 0, -x, x))
    t = tl.div_rn(-e, 2.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def parameters(numbers: tl.tensor, at: tl.tensor, KIND: tl.constexpr) -> tl.tuple:
    """The three parameters of an activation, zero where it has fewer."""
    a, b, c = 0.0, 0.0, 0.0
    if _PARAMETERS[KIND] > 0:
        a = tl.load(numbers + at)
    if _PARAMETERS[KIND] > 1:
        b = tl.load(numbers + at + 1)
    if _PARAMETERS[KIND] > 2:
        c = tl.load(numbers + at + 2)
    return a, b, c


@triton.jit
def curve(x: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The activation at float32 x."""
    if KIND == _SILU:
        return silu(x, 0)
    elif KIND == _GELU:
        return gelu(x, 0)
    elif KIND == _GELU_TANH:
        return gelu_tanh(x, 0)
    elif KIND == _ELU:
        return b * tl.where(x > 0, x, a * exponential_minus_one(tl.where(x > 0, 0.0, c * x)))
    elif KIND == _LEAKY_RELU:
        return tl.where(x > 0, x, a * x)
    elif KIND == _RELU:
        return tl.where(x <= 0, 0.0, x)
    elif KIND == _SOFTPLUS:
        z = a * x
        smooth = log_of_one_plus(exponential(tl.where(z < 0, z, -z))) + tl.where(z < 0, 0.0, z)
        return tl.where(z > b, x, tl.div_rn(smooth, a + tl.zeros_like(x)))
    elif KIND == _TANH:
        return hyperbolic_tangent(x)
    elif KIND == _SIGMOID:
        of, _ = logistic(x)
        return of
    elif KIND == _SQUARE:
        return x * x
    else:
        return exponential_of(x)


@triton.jit
def slope(
    h: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, KIND: tl.constexpr, OF_RESULT: tl.constexpr
) -> tl.tensor:
    """The activation's derivative at h, or OF_RESULT where it is h. At a kink the one from below."""
    if KIND == _SILU:
        return silu(h, 1)
    elif KIND == _GELU:
        return gelu(h, 1)
    elif KIND == _GELU_TANH:
        return gelu_tanh(h, 1)
    elif KIND == _ELU:
        if OF_RESULT:
            return tl.where(h > 0, b, c * (h + a * b))
        else:
            return tl.where(h > 0, b, a * b * c * exponential(tl.where(h > 0, 0.0, c * h)))
    elif KIND == _LEAKY_RELU:
        return tl.where(h > 0, 1.0, a)
    elif KIND == _RELU:
        return tl.where(h > 0, 1.0, 0.0)
    elif KIND == _SOFTPLUS:
        z = a * h
        of, _ = logistic(z)
        return tl.where(z > b, 1.0, of)
    elif KIND == _TANH:
        t = h if OF_RESULT else hyperbolic_tangent(h)
        return tl.fma(-t, t, 1.0)
    elif KIND == _SIGMOID:
        if OF_RESULT:
            return h * (1.0 - h)
        else:
            of, of_minus = logistic(h)
            return of * of_minus
    elif KIND == _SQUARE:
        return 2.0 * h
    else:
        return h if OF_RESULT else exponential_of(h)
