"""Products of matrices: with a constant one, or of two of the sample."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fastebm.ops.lanes import Op

from ..lowering import Lowering
from ..trace import LaneError
from ..values import Constant, Number, Value
from .table import rule


@rule("mm")
def _mm(lowering: Lowering, node: fx.Node, a: Any, b: Any) -> Value:
    if lowering.of_sample(a) and lowering.of_sample(b):
        left, right = (lowering.value(side) for side in (a, b))
        batched = [lowering.reshaped(side, (1, *side.shape)) for side in (left, right)]
        return lowering.pair_product(*batched).viewed(operator.itemgetter(0))
    if lowering.of_sample(b):  # W x = (x^T W^T)^T
        sums = lowering.sums(lowering.places(lowering.value(b)).viewed(_transposed))
        return lowering.product(sums, a, lowering.shape(a)[::-1], _transposed, "transposed").viewed(_transposed)
    sums = lowering.sums(lowering.places(lowering.value(a)))
    return lowering.product(sums, b, lowering.shape(b), _as_it_is, "plain")


@rule("addmm")
def _addmm(lowering: Lowering, node: fx.Node, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    added = lowering.value(bias)
    columns = lowering.shape(b)[1]
    if beta == alpha == 1 and not lowering.of_sample(b) and isinstance(added, Constant) and added.shape == (columns,):
        sums = lowering.sums(lowering.places(lowering.value(a)))
        return lowering.product(sums, b, lowering.shape(b), _as_it_is, "plain", int(added.places[0]))
    product = lowering.binary(Op.MULTIPLY, _mm(lowering, node, a, b), Number(float(alpha)))
    return lowering.binary(Op.ADD, product, lowering.binary(Op.MULTIPLY, added, Number(float(beta))))


@rule("bmm")
def _bmm(lowering: Lowering, node: fx.Node, a: Any, b: Any) -> Value:
    if lowering.of_sample(a) and lowering.of_sample(b):
        return lowering.pair_product(lowering.value(a), lowering.value(b))
    of_left = lowering.of_sample(a)
    given = lowering.places(lowering.value(a if of_left else b))
    if (b if of_left else a).meta["val"].stride(0) == 0:  # one matrix for the whole batch, as `matmul` expands it
        rows = given if of_left else given.viewed(lambda v: v.transpose(0, 2, 1))
        sums = lowering.sums(rows.viewed(lambda v: v.reshape(-1, v.shape[2])))
        select, shape = (_first, lowering.shape(b)[1:]) if of_left else (_first_transposed, lowering.shape(a)[:0:-1])
        made = lowering.product(sums, b if of_left else a, shape, select, select.__name__)
        batched = made.viewed(lambda v: v.reshape(*rows.shape[:2], -1))
        return batched if of_left else batched.viewed(lambda v: v.transpose(0, 2, 1))
    parts = []
    for i in range(given.shape[0]):
        matrix = given.viewed(operator.itemgetter(i))
        if of_left:
            sums, shape = lowering.sums(matrix), lowering.shape(b)[1:]
            parts.append(lowering.product(sums, b, shape, operator.itemgetter(i), ("plain", i)))
        else:
            sums, shape = lowering.sums(matrix.viewed(_transposed)), lowering.shape(a)[:0:-1]
            made = lowering.product(sums, a, shape, functools.partial(_transposed_part, i), ("transposed", i))
            parts.append(made.viewed(_transposed))
    return lowering.stack(parts)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _transposed(matrix: Any) -> Any:
    return matrix.T


def _first(weight: Tensor) -> Tensor:
    return weight[0]


def _first_transposed(weight: Tensor) -> Tensor:
    return weight[0].T


def _transposed_part(i: int, weight: Tensor) -> Tensor:
    return weight[i].T


@rule("linalg_solve_triangular")
def _solve_triangular(
    lowering: Lowering,
    node: fx.Node,
    a: Any,
    b: Any,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Value:
    """By the inverse of a constant matrix, which is evaluated once a chain. Small ones are written out before."""
    size = lowering.shape(a)[-1]
    if lowering.of_sample(a) or lowering.shape(a) not in ((size, size), (1, size, size)):
        raise LaneError("a triangular system of more than 12 numbers, with a matrix that depends on the sample")
    shape = lowering.shape(b)
    flat = lowering.places(lowering.value(b)).viewed(lambda v: v.reshape(-1, *shape[-2:]))
    if flat.shape[0] != 1:
        raise LaneError("several triangular systems with one matrix")
    given = flat.viewed(operator.itemgetter(0))
    select = functools.partial(_inverse, upper, unitriangular, left)
    sums = lowering.sums(given.viewed(_transposed) if left else given)
    made = lowering.product(sums, a, (size, size), select, ("inverse", upper, unitriangular, left))
    return lowering.reshaped(made.viewed(_transposed) if left else made, shape)


def _inverse(upper: bool, unitriangular: bool, transposed: bool, weight: Tensor) -> Tensor:
    matrix = weight.reshape(weight.shape[-2:])
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.solve_triangular(matrix, eye, upper=upper, unitriangular=unitriangular)
    return inverse.T if transposed else inverse
