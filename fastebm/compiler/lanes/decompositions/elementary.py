"""Elementary and special functions from those that lane programs have, to within a few units of float32's last place.

Special functions are sums of Chebyshev polynomials, whose coefficients are computed from PyTorch's float64 kernels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .constants import computed

aten = torch.ops.aten


@functools.cache
def _coefficients(function: Callable[[Tensor], Tensor], low: float, high: float, degree: int) -> tuple[float, ...]:
    """Of the Chebyshev polynomials that interpolate a function on [low, high]."""

    def fit() -> Tensor:
        angle = (torch.arange(degree + 1, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / (degree + 1))
        values = function((angle.cos() + 1) * ((high - low) / 2) + low)
        order = torch.arange(degree + 1, dtype=torch.float64, device="cpu")[:, None]
        return (values * (order * angle).cos()).sum(1) * (2 / (degree + 1))

    first, *rest = computed(fit).tolist()
    return first / 2, *rest


def _chebyshev(x: Tensor, function: Callable[[Tensor], Tensor], low: float, high: float, degree: int) -> Tensor:
    """`function` on [low, high]; x is limited to it."""
    first, *rest = _coefficients(function, low, high, degree)
    y = (x.clamp(low, high) - (low + high) / 2) * (2 / (high - low))
    twice = 2 * y
    after, now = torch.zeros_like(x), torch.full_like(x, rest[-1])
    for c in reversed(rest[:-1]):
        after, now = now, twice * now - after + c
    return y * now - after + first


# ---- powers, logarithms, circles and hyperbolas


def power_of(base: float, x: Tensor) -> Tensor:
    """b^n e^(f log b) with x = n + f; log b in two parts, so that n times the first is exact."""
    if base <= 0 or not x.is_floating_point():
        return NotImplemented
    logarithm = math.log(base)
    mantissa, exponent = math.frexp(logarithm)
    high = math.ldexp(round(mantissa * 4096), exponent - 12)
    n = x.round()
    return (n * high).exp() * ((x - n) * logarithm + n * (logarithm - high)).exp()


def exp2(x: Tensor) -> Tensor:
    return power_of(2.0, x)


def log2(x: Tensor) -> Tensor:
    return x.log() * (1 / math.log(2))


def log10(x: Tensor) -> Tensor:
    return x.log() * (1 / math.log(10))


def tan(x: Tensor) -> Tensor:
    return x.sin() / x.cos()


def asin(x: Tensor) -> Tensor:
    return torch.atan2(x, ((1 - x) * (1 + x)).sqrt())


def acos(x: Tensor) -> Tensor:
    return torch.atan2(((1 - x) * (1 + x)).sqrt(), x)


def sinh(x: Tensor) -> Tensor:
    size = x.abs()
    e = size.expm1()
    half = (size / 2).exp()
    return x.sign() * torch.where(size > 80, 0.5 * half * half, 0.5 * (e + e / (e + 1)))


def cosh(x: Tensor) -> Tensor:
    size = x.abs()
    e, half = size.exp(), (size / 2).exp()
    return torch.where(size > 80, 0.5 * half * half, 0.5 * e + 0.5 / e)


def asinh(x: Tensor) -> Tensor:
    size = x.abs()
    small = (size + size * size / (1 + (1 + size * size).sqrt())).log1p()
    return x.sign() * torch.where(size > 1e4, size.log() + math.log(2), small)


def acosh(x: Tensor) -> Tensor:
    above = x - 1
    value = torch.where(x > 1e4, x.log() + math.log(2), (above + (above * (x + 1)).sqrt()).log1p())
    return torch.where(x < 1, math.nan, value)


def atanh(x: Tensor) -> Tensor:
    size = x.abs()
    return x.sign() * 0.5 * (2 * size / (1 - size)).log1p()


def hypot(x: Tensor, y: Tensor) -> Tensor:
    large, small = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.where(large == 0, 0.0, large * (1 + (small / large).square()).sqrt())


def sinc(x: Tensor) -> Tensor:
    turned = x * math.pi
    return torch.where(x == 0, 1.0, turned.sin() / turned)


def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    large = torch.maximum(x, y)
    rest = (-(x - y).abs()).exp().log1p()
    return torch.where((x == y) & (x.abs() == math.inf), x, large + rest)


def logaddexp2(x: Tensor, y: Tensor) -> Tensor:
    large = torch.maximum(x, y)
    return torch.where((x == y) & (x.abs() == math.inf), x, large + log2(1 + exp2(-(x - y).abs())))


def copysign(x: Tensor, y: Any) -> Tensor:
    if not isinstance(y, Tensor):
        return x.abs() * math.copysign(1.0, y)
    # The sign of a zero is that of its reciprocal.
    negative = torch.where(y == 0, y.reciprocal(), y) < 0
    return torch.where(negative, -x.abs(), x.abs())


def frac(x: Tensor) -> Tensor:
    return x - x.trunc()


def fmax(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y)))


def fmin(x: Tensor, y: Tensor) -> Tensor:
    return -fmax(-x, -y)


# ---- the normal distribution


def _scaled_tail(t: Tensor) -> Tensor:
    """erfcx(z) / t at z = 4 / t - 4: smooth for t in [0, 1]."""
    z = 4 / t.clamp(min=1e-12) - 4
    return torch.special.erfcx(z) / t.clamp(min=1e-12)


def _tail(size: Tensor) -> Tensor:
    """erfcx of numbers >= 0."""
    t = 4 / (4 + size)
    return t * _chebyshev(t, _scaled_tail, 0.0, 1.0, 18)


def _gaussian(x: Tensor) -> Tensor:
    """e^(-x^2). A part of x whose square is exact goes apart, as rounding a large square would be felt."""
    part = (x * 16).round() / 16
    return (-part * part).exp() * ((part - x) * (part + x)).exp()


def erfc(x: Tensor) -> Tensor:
    tail = _tail(x.abs()) * _gaussian(x.clamp(-12, 12))
    return torch.where(x.abs() < 0.5, 1 - x.erf(), torch.where(x < 0, 2 - tail, tail))


def erfcx(x: Tensor) -> Tensor:
    return torch.where(x < 0, 2 / _gaussian(x.clamp(-10, 0)) - _tail(x.abs()), _tail(x.abs()))


def erfinv(x: Tensor) -> Tensor:
    """By M. Giles' approximations in w = -log(1 - x^2) (GPU Computing Gems, 2011)."""
    w = -((1 - x) * (1 + x)).log()
    near, far = w - 2.5, w.clamp(min=5).sqrt() - 3
    small, large = torch.zeros_like(x), torch.zeros_like(x)
    for c in _NEAR:
        small = small * near + c
    for c in _FAR:
        large = large * far + c
    return x * torch.where(w < 5, small, torch.where(x.abs() == 1, math.inf, large))


_NEAR = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_FAR = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


# ---- Bessel functions


def _bessel(function: Callable[[Tensor], Tensor], size: Tensor, far: Callable[[Tensor], Tensor]) -> Tensor:
    """An exponentially scaled Bessel function of numbers >= 0: beyond 8 by a polynomial in 1 / x."""
    inverse = 1 / size.clamp(min=8)
    large = _chebyshev(inverse, far, 0.0, 0.125, 8) * inverse.sqrt()
    return torch.where(size <= 8, _chebyshev(size, function, 0.0, 8.0, 22), large)


def _far_i0e(inverse: Tensor) -> Tensor:
    x = 1 / inverse.clamp(min=1e-12)
    return torch.special.i0e(x) * x.sqrt()


def _far_i1e(inverse: Tensor) -> Tensor:
    x = 1 / inverse.clamp(min=1e-12)
    return torch.special.i1e(x) * x.sqrt()


def _i1e_over_x(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.5, torch.special.i1e(x) / x)


def i0e(x: Tensor) -> Tensor:
    return _bessel(torch.special.i0e, x.abs(), _far_i0e)


def i1e(x: Tensor) -> Tensor:
    size = x.abs()
    inverse = 1 / size.clamp(min=8)
    large = _chebyshev(inverse, _far_i1e, 0.0, 0.125, 8) * inverse.sqrt()
    return x.sign() * torch.where(size <= 8, size * _chebyshev(size, _i1e_over_x, 0.0, 8.0, 22), large)


def i0(x: Tensor) -> Tensor:
    return i0e(x) * x.abs().exp()


def i1(x: Tensor) -> Tensor:
    return i1e(x) * x.abs().exp()


# ---- the gamma function


def _lgamma_over_roots(x: Tensor) -> Tensor:
    """lgamma(x) / ((x - 1) (x - 2)) on [1, 3], smooth there. An even number of nodes leaves 2 out."""
    return torch.lgamma(x) / ((x - 1) * (x - 2))


def _stirling(x: Tensor) -> Tensor:
    """lgamma of numbers >= 3."""
    r = 1 / x
    z = r * r
    series = ((-1 / 1680 * z + 1 / 1260) * z - 1 / 360) * z + 1 / 12
    return (x - 0.5) * (x.log() - 1) + (0.5 * math.log(2 * math.pi) - 0.5) + series * r


def _lgamma_positive(x: Tensor) -> Tensor:
    small = x < 1
    y = torch.where(small, x + 1, x)
    # x - 1 is the more exact for x just below 1, where y - 2 is.
    roots = torch.where(small, x * (x - 1), (x - 1) * (x - 2))
    middle = roots * _chebyshev(y, _lgamma_over_roots, 1.0, 3.0, 17)
    middle = torch.where(small, middle - x.log(), middle)
    return torch.where(x < 3, middle, _stirling(x.clamp(min=3)))


def lgamma(x: Tensor) -> Tensor:
    below = x < 0.0
    turned = torch.where(below, 1 - x, x)
    value = _lgamma_positive(turned)
    sine = (math.pi * (x - x.round())).sin().abs()
    return torch.where(below, math.log(math.pi) - sine.log() - value, value)


def digamma(x: Tensor) -> Tensor:
    below = x < 0
    y = torch.where(below, 1 - x, x)
    shift = torch.zeros_like(y)
    for _ in range(6):
        low = y < 6
        shift = torch.where(low, shift - 1 / y, shift)
        y = torch.where(low, y + 1, y)
    z = (1 / y).square()
    series = (((1 / 240 * z - 1 / 252) * z + 1 / 120) * z - 1 / 12) * z
    value = y.log() - 0.5 / y + series + shift
    rest = x - x.round()
    turn = math.pi * torch.where(rest == 0, math.nan, rest)  # there are no values at 0, -1, -2, ...
    value = torch.where(below, value - math.pi * turn.cos() / turn.sin(), value)
    return torch.where(x == 0, -x.reciprocal(), value)


def polygamma(n: int, x: Tensor) -> Tensor:
    if n == 0:
        return digamma(x)
    if n != 1:
        return NotImplemented
    below = x < 0.5
    y = torch.where(below, 1 - x, x)
    shift = torch.zeros_like(y)
    for _ in range(6):
        low = y < 6
        shift = torch.where(low, shift + (1 / y).square(), shift)
        y = torch.where(low, y + 1, y)
    r = 1 / y
    z = r.square()
    series = (((-1 / 30 * z + 1 / 42) * z - 1 / 30) * z + 1 / 6) * z * r
    value = r + 0.5 * z + series + shift
    sine = (math.pi * (x - x.round())).sin()
    return torch.where(below, (math.pi / sine).square() - value, value)


TABLE: dict[Any, Any] = {
    aten.pow.Scalar: power_of,
    aten.exp2.default: exp2,
    aten.log2.default: log2,
    aten.log10.default: log10,
    aten.tan.default: tan,
    aten.asin.default: asin,
    aten.acos.default: acos,
    aten.sinh.default: sinh,
    aten.cosh.default: cosh,
    aten.asinh.default: asinh,
    aten.acosh.default: acosh,
    aten.atanh.default: atanh,
    aten.hypot.default: hypot,
    aten.sinc.default: sinc,
    aten.logaddexp.default: logaddexp,
    aten.logaddexp2.default: logaddexp2,
    aten.copysign.Tensor: copysign,
    aten.copysign.Scalar: copysign,
    aten.frac.default: frac,
    aten.fmax.default: fmax,
    aten.fmin.default: fmin,
    aten.erfc.default: erfc,
    aten.special_erfcx.default: erfcx,
    aten.erfinv.default: erfinv,
    aten.special_i0e.default: i0e,
    aten.special_i1e.default: i1e,
    aten.i0.default: i0,
    aten.special_i1.default: i1,
    aten.lgamma.default: lgamma,
    aten.digamma.default: digamma,
    aten.polygamma.default: polygamma,
}
