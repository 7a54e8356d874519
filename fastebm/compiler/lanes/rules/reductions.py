"""Operations over axes."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx

from fastebm.ops.lanes import Op, Reduction

from ..lowering import Lowering
from ..values import Number, Value
from .table import RULES, rule

_REDUCTIONS = {
    "sum": Reduction.SUM,
    "amax": Reduction.MAXIMUM,
    "amin": Reduction.MINIMUM,
    "prod": Reduction.PRODUCT,
    "max": Reduction.MAXIMUM,
    "min": Reduction.MINIMUM,
}


def _reduce(
    reduction: Reduction, lowering: Lowering, node: fx.Node, x: Any, dim: Any = None, keepdim: bool = False, **_: Any
) -> Value:
    value = lowering.value(x)
    return lowering.reduce(value, reduction, axes(dim, len(value.shape)), keepdim)


def axes(dim: Any, ndim: int) -> list[int]:
    """The axes that an argument names; all of them for None and for []."""
    if dim is None or dim == []:
        return list(range(ndim))
    return [dim] if isinstance(dim, int) else list(dim)


for _name, _reduction in _REDUCTIONS.items():
    RULES[_name] = functools.partial(_reduce, _reduction)


@rule("any")
def _any(lowering: Lowering, node: fx.Node, x: Any, dim: Any = None, keepdim: bool = False) -> Value:
    value = lowering.binary(Op.NOT_EQUAL, lowering.value(x), Number(0.0))
    return lowering.reduce(value, Reduction.MAXIMUM, axes(dim, len(value.shape)), keepdim)


@rule("all")
def _all(lowering: Lowering, node: fx.Node, x: Any, dim: Any = None, keepdim: bool = False) -> Value:
    value = lowering.binary(Op.NOT_EQUAL, lowering.value(x), Number(0.0))
    return lowering.reduce(value, Reduction.MINIMUM, axes(dim, len(value.shape)), keepdim)


@rule("cumsum")
def _cumsum(lowering: Lowering, node: fx.Node, x: Any, dim: int, **_: Any) -> Value:
    value = lowering.value(x)
    return lowering.scan(value, dim) if value.shape else value
