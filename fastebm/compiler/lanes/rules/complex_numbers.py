"""Complex tensors are pairs of real ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fastebm.ops.lanes import Op, Reduction

from ..lowering import Lowering, as_complex
from ..recording import LaneError
from ..values import Complex, Number, Real, Value
from .reductions import axes
from .table import COMPLEX_RULES, rule


def _both(lowering: Lowering, op: Op, *values: Complex) -> Complex:
    return Complex(lowering.binary(op, *(v.real for v in values)), lowering.binary(op, *(v.imag for v in values)))


def _complex(lowering: Lowering, given: Any) -> Complex:
    if isinstance(given, complex):
        return Complex(Number(given.real), Number(given.imag))
    return as_complex(lowering.value(given))


def times(lowering: Lowering, a: Complex, b: Complex) -> Complex:
    if isinstance(b.imag, Number) and b.imag.value == 0:
        return Complex(lowering.binary(Op.MULTIPLY, a.real, b.real), lowering.binary(Op.MULTIPLY, a.imag, b.real))
    if isinstance(a.imag, Number) and a.imag.value == 0:
        return times(lowering, b, a)

    def product(x: Real, y: Real) -> Real:
        return lowering.binary(Op.MULTIPLY, x, y)

    real = lowering.binary(Op.SUBTRACT, product(a.real, b.real), product(a.imag, b.imag))
    return Complex(real, lowering.binary(Op.ADD, product(a.real, b.imag), product(a.imag, b.real)))


@rule("mul", table=COMPLEX_RULES)
def _mul(lowering: Lowering, node: fx.Node, a: Any, b: Any) -> Value:
    return times(lowering, _complex(lowering, a), _complex(lowering, b))


@rule("div", table=COMPLEX_RULES)
def _div(lowering: Lowering, node: fx.Node, a: Any, b: Any) -> Value:
    x, y = _complex(lowering, a), _complex(lowering, b)
    if isinstance(y.imag, Number) and y.imag.value == 0:
        return Complex(lowering.binary(Op.DIVIDE, x.real, y.real), lowering.binary(Op.DIVIDE, x.imag, y.real))
    # Scaled by the larger part, so that the square of the divisor neither overflows nor vanishes.
    parts = [lowering.pointwise(Op.ABSOLUTE, part) for part in (y.real, y.imag)]
    scale = lowering.pointwise(Op.MAXIMUM, *parts)
    real, imag = (lowering.binary(Op.DIVIDE, part, scale) for part in (y.real, y.imag))
    squares = [lowering.pointwise(Op.SQUARE, part) for part in (real, imag)]
    norm = lowering.binary(Op.MULTIPLY, lowering.binary(Op.ADD, *squares), scale)
    product = times(lowering, x, Complex(real, lowering.pointwise(Op.NEGATE, imag)))
    return Complex(lowering.binary(Op.DIVIDE, product.real, norm), lowering.binary(Op.DIVIDE, product.imag, norm))


def _sum_of(op: Op, lowering: Lowering, a: Any, b: Any, alpha: Any) -> Value:
    scaled = times(lowering, _complex(lowering, b), _complex(lowering, alpha))
    return _both(lowering, op, _complex(lowering, a), scaled)


@rule("add", table=COMPLEX_RULES)
def _add(lowering: Lowering, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Value:
    return _sum_of(Op.ADD, lowering, a, b, alpha)


@rule("sub", table=COMPLEX_RULES)
def _sub(lowering: Lowering, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Value:
    return _sum_of(Op.SUBTRACT, lowering, a, b, alpha)


@rule("neg", table=COMPLEX_RULES)
def _neg(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    value = _complex(lowering, x)
    return Complex(lowering.pointwise(Op.NEGATE, value.real), lowering.pointwise(Op.NEGATE, value.imag))


@rule("_conj", "_conj_physical", "conj_physical", "_neg_view", table=COMPLEX_RULES)
def _conj(lowering: Lowering, node: Any, x: Any) -> Value:
    value = _complex(lowering, x)
    if "neg" in node.target._schema.name:
        return _neg(lowering, node, x)
    return Complex(value.real, lowering.pointwise(Op.NEGATE, value.imag))


@rule("alias", "clone", "detach", "lift_fresh_copy", "lift_fresh", "contiguous", "resolve_conj", table=COMPLEX_RULES)
def _same(lowering: Lowering, node: fx.Node, x: Any, **options: Any) -> Value:
    return lowering.value(x)


@rule("_to_copy", table=COMPLEX_RULES)
def _to_copy(lowering: Lowering, node: fx.Node, x: Any, **options: Any) -> Value:
    value = _complex(lowering, x)
    wanted = lowering.dtype(node)
    assert wanted is not None
    return value if wanted.is_complex else value.real


@rule("view_as_real", table=COMPLEX_RULES)
def _view_as_real(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    value = _complex(lowering, x)
    return lowering.stack([value.real, value.imag], -1)


@rule("view_as_complex", table=COMPLEX_RULES)
def _view_as_complex(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    value, shape = lowering.value(x), lowering.shape(node)
    return Complex(lowering.view(value, lambda a: a[..., 0], shape), lowering.view(value, lambda a: a[..., 1], shape))


@rule("complex", table=COMPLEX_RULES)
def _of_parts(lowering: Lowering, node: fx.Node, real: Any, imag: Any) -> Value:
    shape = lowering.shape(node)
    return Complex(*(lowering.broadcast(lowering.value(part), shape) for part in (real, imag)))


@rule("polar", table=COMPLEX_RULES)
def _polar(lowering: Lowering, node: fx.Node, radius: Any, angle: Any) -> Value:
    size, turn = lowering.value(radius), lowering.value(angle)
    return Complex(*(lowering.binary(Op.MULTIPLY, size, lowering.pointwise(op, turn)) for op in (Op.COS, Op.SIN)))


@rule("real", table=COMPLEX_RULES)
def _real(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    return _complex(lowering, x).real


@rule("imag", table=COMPLEX_RULES)
def _imag(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    return _complex(lowering, x).imag


def _magnitude(lowering: Lowering, value: Complex) -> Real:
    """sqrt(re^2 + im^2), scaled by the larger part."""
    parts = [lowering.pointwise(Op.ABSOLUTE, part) for part in (value.real, value.imag)]
    large = lowering.pointwise(Op.MAXIMUM, *parts)
    ratio = lowering.binary(Op.DIVIDE, lowering.pointwise(Op.MINIMUM, *parts), large)
    grown = lowering.binary(Op.ADD, lowering.pointwise(Op.SQUARE, ratio), Number(1.0))
    norm = lowering.binary(Op.MULTIPLY, large, lowering.pointwise(Op.SQUARE_ROOT, grown))
    return lowering.pointwise(Op.SELECT, lowering.binary(Op.EQUAL, large, Number(0.0)), Number(0.0), norm)


@rule("abs", table=COMPLEX_RULES)
def _abs(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    return _magnitude(lowering, _complex(lowering, x))


@rule("sgn", table=COMPLEX_RULES)
def _sgn(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    value = _complex(lowering, x)
    norm = _magnitude(lowering, value)
    zero = lowering.binary(Op.EQUAL, norm, Number(0.0))

    def part(of: Real) -> Real:
        return lowering.pointwise(Op.SELECT, zero, Number(0.0), lowering.binary(Op.DIVIDE, of, norm))

    return Complex(part(value.real), part(value.imag))


@rule("angle", table=COMPLEX_RULES)
def _angle(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    value = _complex(lowering, x)
    return lowering.pointwise(Op.ATAN2, value.imag, value.real)


@rule("exp", table=COMPLEX_RULES)
def _exp(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    value = _complex(lowering, x)
    size = lowering.pointwise(Op.EXP, value.real)
    turned = (lowering.pointwise(op, value.imag) for op in (Op.COS, Op.SIN))
    return Complex(*(lowering.binary(Op.MULTIPLY, size, part) for part in turned))


@rule("sum", table=COMPLEX_RULES)
def _sum(lowering: Lowering, node: fx.Node, x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
    value = _complex(lowering, x)
    over = axes(dim, len(value.shape))
    return Complex(*(lowering.reduce(part, Reduction.SUM, over, keepdim) for part in (value.real, value.imag)))


@rule("where", table=COMPLEX_RULES)
def _where(lowering: Lowering, node: fx.Node, condition: Any, a: Any, b: Any) -> Value:
    chosen, x, y = lowering.value(condition), _complex(lowering, a), _complex(lowering, b)
    parts = ((x.real, y.real), (x.imag, y.imag))
    return Complex(*(lowering.pointwise(Op.SELECT, chosen, first, second) for first, second in parts))


@rule("zeros_like", "new_zeros", "empty_like", "new_empty", table=COMPLEX_RULES)
def _zeros(lowering: Lowering, node: fx.Node, *arguments: Any, **options: Any) -> Value:
    return as_complex(Number(0.0, lowering.shape(node)))


@rule("ones_like", table=COMPLEX_RULES)
def _ones(lowering: Lowering, node: fx.Node, *arguments: Any, **options: Any) -> Value:
    return as_complex(Number(1.0, lowering.shape(node)))


@rule("eq", table=COMPLEX_RULES)
def _eq(lowering: Lowering, node: fx.Node, a: Any, b: Any) -> Value:
    same = _both(lowering, Op.EQUAL, _complex(lowering, a), _complex(lowering, b))
    return lowering.pointwise(Op.LOGICAL_AND, same.real, same.imag)


@rule("ne", table=COMPLEX_RULES)
def _ne(lowering: Lowering, node: fx.Node, a: Any, b: Any) -> Value:
    return lowering.pointwise(Op.LOGICAL_NOT, _eq(lowering, node, a, b))


@rule("logical_not", table=COMPLEX_RULES)
def _not(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    return _eq(lowering, node, x, 0)


@rule("pow", table=COMPLEX_RULES)
def _pow(lowering: Lowering, node: fx.Node, x: Any, exponent: Any) -> Value:
    if not isinstance(exponent, int | float) or exponent != int(exponent) or not 0 < exponent <= 64:
        raise LaneError("a power of a complex number that is not a small whole one")
    value = _complex(lowering, x)
    result = value
    for _ in range(int(exponent) - 1):
        result = times(lowering, result, value)
    return result


@rule("reciprocal", table=COMPLEX_RULES)
def _reciprocal(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    return _div(lowering, node, 1, x)


@rule("sin", "cos", "log", "sqrt", "tanh", table=COMPLEX_RULES)
def _missing(lowering: Lowering, node: Any, x: Any) -> Value:
    raise LaneError(f"{node.target._schema.name.removeprefix('aten::')} of complex numbers")


# ---- Fourier transforms, as products with the cosines and sines of each axis


@rule("_fft_c2c", table=COMPLEX_RULES)
def _fft_c2c(lowering: Lowering, node: fx.Node, x: Any, dim: Any, normalization: int, forward: bool) -> Value:
    value = _complex(lowering, x)
    for axis in dim:
        value = _transform(lowering, value, axis, value.shape[axis], normalization, forward)
    return value


@rule("_fft_r2c", table=COMPLEX_RULES)
def _fft_r2c(lowering: Lowering, node: fx.Node, x: Any, dim: Any, normalization: int, onesided: bool) -> Value:
    value = _complex(lowering, x)
    for i, axis in enumerate(reversed(dim)):
        n = value.shape[axis]
        value = _transform(lowering, value, axis, n // 2 + 1 if onesided and i == 0 else n, normalization, True)
    return value


@rule("_fft_c2r", table=COMPLEX_RULES)
def _fft_c2r(lowering: Lowering, node: fx.Node, x: Any, dim: Any, normalization: int, last: int) -> Value:
    value = _complex(lowering, x)
    for axis in dim[:-1]:
        value = _transform(lowering, value, axis, value.shape[axis], normalization, False)
    axis = dim[-1]
    # The half that is given stands for both halves; the imaginary parts of frequency 0 and n / 2 count for nothing.
    given = min(value.shape[axis], last // 2 + 1)
    twice = torch.full((value.shape[axis],), 2.0, dtype=torch.float64, device="cpu")
    twice[0] = 1.0
    if last % 2 == 0 and last // 2 < len(twice):
        twice[last // 2] = 1.0
    twice[given:] = 0.0
    turn = _turns(value.shape[axis], last, last)
    scale = _scale(last, normalization) * twice[:, None]
    real = _times_matrix(lowering, value.real, axis, turn.cos() * scale)
    imag = _times_matrix(lowering, value.imag, axis, -turn.sin() * scale)
    return lowering.binary(Op.ADD, real, imag)


def _turns(rows: int, columns: int, n: int) -> Tensor:
    """2 pi j k / n, exact before rounding."""
    j, k = torch.arange(rows, device="cpu")[:, None], torch.arange(columns, device="cpu")[None, :]
    return (j * k % n).to(torch.float64) * (2 * np.pi / n)


def _scale(n: int, normalization: int) -> float:
    return {0: 1.0, 1: n**-0.5, 2: 1.0 / n}[int(normalization)]


def _transform(lowering: Lowering, value: Complex, axis: int, out: int, normalization: int, forward: bool) -> Complex:
    n = value.shape[axis]
    turn, scale = _turns(n, out, n), _scale(n, normalization)
    cos, sin = turn.cos() * scale, turn.sin() * (-scale if forward else scale)
    sin[sin.abs() < 1e-15 * scale] = 0.0
    real = _times_matrix(lowering, value.real, axis, cos), _times_matrix(lowering, value.imag, axis, sin)
    imag = _times_matrix(lowering, value.real, axis, sin), _times_matrix(lowering, value.imag, axis, cos)
    return Complex(lowering.binary(Op.SUBTRACT, *real), lowering.binary(Op.ADD, *imag))


def _times_matrix(lowering: Lowering, value: Real, axis: int, matrix: Tensor) -> Real:
    """An axis of a real tensor times a constant matrix, (n, out)."""
    n, out = matrix.shape
    shape = list(value.shape)
    shape[axis] = out
    if isinstance(value, Number) and value.value == 0:
        return Number(0.0, tuple(shape))
    rows = lowering.places(value).viewed(lambda a: np.moveaxis(a, axis, -1).reshape(-1, n))
    made = lowering.product(lowering.sums(rows), matrix, (n, out), lambda t: t, "plain")
    moved = list(value.shape)
    moved.append(out)
    del moved[axis if axis >= 0 else axis - 1]
    return made.viewed(lambda a: np.moveaxis(a.reshape(moved), -1, axis))
