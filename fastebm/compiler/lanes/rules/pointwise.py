"""Operations on one number after the other."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import fx

from fastebm.ops.lanes import Op

from ..lowering import Lowering
from ..recording import LaneError
from ..values import Number, Value
from .table import RULES, rule

_UNARY = {
    "neg": Op.NEGATE,
    "exp": Op.EXP,
    "expm1": Op.EXPM1,
    "log": Op.LOG,
    "log1p": Op.LOG1P,
    "sin": Op.SIN,
    "cos": Op.COS,
    "tanh": Op.TANH,
    "sigmoid": Op.SIGMOID,
    "erf": Op.ERF,
    "atan": Op.ATAN,
    "sqrt": Op.SQUARE_ROOT,
    "abs": Op.ABSOLUTE,
    "rsqrt": Op.RECIPROCAL_ROOT,
    "reciprocal": Op.RECIPROCAL,
    "sign": Op.SIGN,
    "sgn": Op.SIGN,
    "floor": Op.FLOOR,
    "ceil": Op.CEIL,
    "round": Op.ROUND,
    "trunc": Op.TRUNCATE,
    "fix": Op.TRUNCATE,
    "logical_not": Op.LOGICAL_NOT,
    "isnan": Op.IS_NAN,
    "square": Op.SQUARE,
    "silu": Op.SILU,
}
_BINARY = {
    "mul": Op.MULTIPLY,
    "atan2": Op.ATAN2,
    "pow": Op.POWER,
    "minimum": Op.MINIMUM,
    "maximum": Op.MAXIMUM,
    "lt": Op.LESS,
    "le": Op.LESS_EQUAL,
    "eq": Op.EQUAL,
    "ne": Op.NOT_EQUAL,
    "gt": Op.GREATER,
    "ge": Op.GREATER_EQUAL,
    "logical_and": Op.LOGICAL_AND,
    "logical_or": Op.LOGICAL_OR,
    "logical_xor": Op.NOT_EQUAL,
    "remainder": Op.REMAINDER,
}
_OF_TRUTH = {
    "bitwise_and": Op.LOGICAL_AND,
    "bitwise_or": Op.LOGICAL_OR,
    "bitwise_xor": Op.NOT_EQUAL,
    "__and__": Op.LOGICAL_AND,
    "__or__": Op.LOGICAL_OR,
    "__xor__": Op.NOT_EQUAL,
}


def _unary(op: Op, lowering: Lowering, node: fx.Node, x: Any, **options: Any) -> Value:
    if options.get("decimals"):
        raise LaneError("round with decimals")
    return lowering.pointwise(op, lowering.value(x))


def _binary(op: Op, lowering: Lowering, node: fx.Node, a: Any, b: Any) -> Value:
    return lowering.binary(op, lowering.value(a), lowering.value(b))


def _of_truth(op: Op, lowering: Lowering, node: fx.Node, a: Any, b: Any) -> Value:
    if lowering.dtype(node) is not torch.bool:
        raise LaneError("an operation on the bits of integers")
    return lowering.binary(op, lowering.value(a), lowering.value(b))


for _name, _op in _UNARY.items():
    RULES[_name] = functools.partial(_unary, _op)
for _name, _op in _BINARY.items():
    RULES[_name] = functools.partial(_binary, _op)
for _name, _op in _OF_TRUTH.items():
    RULES[_name] = functools.partial(_of_truth, _op)


@rule("bitwise_not")
def _bitwise_not(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    if lowering.dtype(node) is not torch.bool:
        raise LaneError("an operation on the bits of integers")
    return lowering.pointwise(Op.LOGICAL_NOT, lowering.value(x))


@rule("add")
def _add(lowering: Lowering, node: fx.Node, a: Any, b: Any, alpha: float = 1) -> Value:
    return lowering.binary(Op.ADD, lowering.value(a), _scaled(lowering, lowering.value(b), alpha))


@rule("sub")
def _sub(lowering: Lowering, node: fx.Node, a: Any, b: Any, alpha: float = 1) -> Value:
    return lowering.binary(Op.SUBTRACT, lowering.value(a), _scaled(lowering, lowering.value(b), alpha))


@rule("rsub")
def _rsub(lowering: Lowering, node: fx.Node, a: Any, b: Any, alpha: float = 1) -> Value:
    return lowering.binary(Op.SUBTRACT, lowering.value(b), _scaled(lowering, lowering.value(a), alpha))


def _scaled(lowering: Lowering, value: Value, alpha: float) -> Value:
    return value if alpha == 1 else lowering.binary(Op.MULTIPLY, value, Number(float(alpha)))


@rule("div")
def _div(lowering: Lowering, node: fx.Node, a: Any, b: Any, *, rounding_mode: str | None = None) -> Value:
    quotient = lowering.binary(Op.DIVIDE, lowering.value(a), lowering.value(b))
    if rounding_mode is None:
        return quotient
    return lowering.pointwise(Op.FLOOR if rounding_mode == "floor" else Op.TRUNCATE, quotient)


@rule("fmod")
def _fmod(lowering: Lowering, node: fx.Node, a: Any, b: Any) -> Value:
    """The remainder with the sign of the dividend."""
    x, y = lowering.value(a), lowering.value(b)
    rest = lowering.binary(Op.REMAINDER, lowering.pointwise(Op.ABSOLUTE, x), lowering.pointwise(Op.ABSOLUTE, y))
    below = lowering.binary(Op.LESS, x, Number(0.0))
    return lowering.pointwise(Op.SELECT, below, lowering.pointwise(Op.NEGATE, rest), rest)


@rule("where")
def _where(lowering: Lowering, node: fx.Node, condition: Any, a: Any, b: Any) -> Value:
    return lowering.pointwise(Op.SELECT, *(lowering.value(v) for v in (condition, a, b)))


@rule("relu")
def _relu(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    return lowering.pointwise(Op.MAXIMUM_NUMBER, lowering.value(x))


@rule("leaky_relu")
def _leaky_relu(lowering: Lowering, node: fx.Node, x: Any, slope: float = 0.01) -> Value:
    value = lowering.value(x)
    above = lowering.pointwise(Op.GREATER_NUMBER, value)
    return lowering.pointwise(Op.SELECT, above, value, lowering.binary(Op.MULTIPLY, value, Number(slope)))


@rule("clamp")
def _clamp(lowering: Lowering, node: fx.Node, x: Any, low: Any = None, high: Any = None) -> Value:
    value = lowering.value(x)
    if low is not None:
        value = lowering.binary(Op.MAXIMUM, value, lowering.value(low))
    if high is not None:
        value = lowering.binary(Op.MINIMUM, value, lowering.value(high))
    return value


@rule("isinf")
def _isinf(lowering: Lowering, node: fx.Node, x: Any) -> Value:
    magnitude = lowering.pointwise(Op.ABSOLUTE, lowering.value(x))
    return lowering.pointwise(Op.EQUAL_NUMBER, magnitude, number=math.inf)


@rule("alias", "clone", "detach", "lift_fresh_copy", "lift_fresh", "contiguous")
def _same(lowering: Lowering, node: fx.Node, x: Any, **options: Any) -> Value:
    return lowering.value(x)


@rule("_to_copy")
def _to_copy(lowering: Lowering, node: fx.Node, x: Any, **options: Any) -> Value:
    return converted(lowering, lowering.value(x), lowering.dtype(x), lowering.dtype(node))


def converted(lowering: Lowering, value: Value, given: torch.dtype | None, wanted: torch.dtype | None) -> Value:
    """Numbers of one dtype in another."""
    assert given is not None
    assert wanted is not None
    if wanted is torch.bool and given is not torch.bool:
        return lowering.binary(Op.NOT_EQUAL, value, Number(0.0))
    if given.is_floating_point and not wanted.is_floating_point and wanted is not torch.bool:
        if wanted not in (torch.int64, torch.int32):
            raise LaneError(f"numbers of the sample as {wanted}")
        return lowering.pointwise(Op.TRUNCATE, value)
    return value


_FILLED = {"zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0}


def _filled(number: float, lowering: Lowering, node: fx.Node, *arguments: Any, **options: Any) -> Value:
    return Number(number, lowering.shape(node))


for _name, _number in _FILLED.items():
    RULES[_name] = functools.partial(_filled, _number)


@rule("empty_like", "new_empty", "new_empty_strided")
def _empty(lowering: Lowering, node: fx.Node, *arguments: Any, **options: Any) -> Value:
    return Number(0.0, lowering.shape(node))


@rule("full_like", "new_full", "fill")
def _full(lowering: Lowering, node: fx.Node, *arguments: Any, **options: Any) -> Value:
    filled = lowering.value(arguments[-1] if len(arguments) > 1 else options["fill_value"])
    return lowering.broadcast(filled, lowering.shape(node))
