"""Reading and writing at indices.

An index that is known while lowering is nothing but addresses. One that depends on the sample is compared with every
place that it may name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fastebm.ops.lanes import Op, Reduction

from ..lowering import Lowering, as_complex, flat_places
from ..recording import LaneError
from ..values import Array, Complex, Number, Places, Real, Shape, Value
from .table import COMPLEX_RULES, rule

# Comparisons of an index with places. Beyond, other ways are faster.
MAX_COMPARISONS = 1 << 20


@rule("index")
@rule("index", table=COMPLEX_RULES)
def _index(lowering: Lowering, node: fx.Node, x: Any, indices: Any) -> Value:
    value = lowering.value(x)
    if any(lowering.of_sample(index) for index in indices):
        return _read(lowering, value, *_linear(lowering, value.shape, indices))
    given = _slices(lowering, indices)
    return lowering.moved(value, lambda places: places[given], lowering.shape(node))


def _slices(lowering: Lowering, indices: Any) -> tuple[Any, ...]:
    return tuple(slice(None) if i is None else lowering.known(i, "an index") for i in indices)


def _linear(lowering: Lowering, shape: Shape, indices: Any) -> tuple[Real, int, int]:
    """Several indices as one into the axes that they index, the first such axis, and how many there are."""
    used = [axis for axis, index in enumerate(indices) if index is not None]
    if used != list(range(used[0], used[-1] + 1)):
        raise LaneError("indices that depend on the sample, with a slice between them")
    total: Real | None = None
    for axis in used:
        index = _positive(lowering, lowering.value(indices[axis]), shape[axis])
        scaled = lowering.binary(Op.MULTIPLY, index, Number(float(math.prod(shape[axis + 1 : used[-1] + 1]))))
        total = scaled if total is None else lowering.binary(Op.ADD, total, scaled)
    assert total is not None
    return total, used[0], len(used)


def _positive(lowering: Lowering, index: Real, length: int) -> Real:
    below = lowering.binary(Op.LESS, index, Number(0.0))
    return lowering.pointwise(Op.SELECT, below, lowering.binary(Op.ADD, index, Number(float(length))), index)


def _read(lowering: Lowering, value: Real, index: Real, first: int, count: int) -> Value:
    """value[..., index, ...], where `index` goes over `count` axes from `first` on."""
    before, after = value.shape[:first], value.shape[first + count :]
    length = math.prod(value.shape[first : first + count])
    flat = lowering.reshaped(value, (math.prod(before), length, math.prod(after)))
    picked = _pick(
        lowering,
        lowering.view(flat, lambda a: a.transpose(0, 2, 1)[:, None], (flat.shape[0], 1, flat.shape[2], length)),
        lowering.reshaped(index, (1, math.prod(index.shape), 1, 1)),
        length,
    )
    return lowering.reshaped(picked, (*before, *index.shape, *after))


def _pick(lowering: Lowering, value: Real, index: Real, length: int) -> Real:
    """The numbers of the last axis that `index` names."""
    _limit(math.prod(np.broadcast_shapes(value.shape, index.shape)) * (1 if value.shape[-1] == length else length))
    named = lowering.binary(Op.EQUAL, index, lowering.literal(torch.arange(length, dtype=torch.float32, device="cpu")))
    shape = tuple(np.broadcast_shapes(named.shape, value.shape))
    chosen = lowering.pointwise(Op.SELECT, lowering.broadcast(named, shape), value, Number(0.0))
    return lowering.reduce(chosen, Reduction.SUM, [-1])


def _limit(comparisons: int) -> None:
    if comparisons > MAX_COMPARISONS:
        raise LaneError("an index that depends on the sample, into a large tensor")


@rule("gather")
def _gather(lowering: Lowering, node: fx.Node, x: Any, dim: int, index: Any, **_: Any) -> Value:
    value = lowering.value(x)
    shape = lowering.shape(index)
    if not lowering.of_sample(index):
        known = lowering.known(index, "an index")
        return lowering.moved(value, lambda places: torch.gather(places, dim, known), shape)
    dim %= len(shape)
    cut = tuple(slice(None) if axis == dim else slice(n) for axis, n in enumerate(shape))
    length = value.shape[dim]
    others = (*shape[:dim], *shape[dim + 1 :])
    moved = lowering.view(value, lambda a: np.moveaxis(a[cut], dim, -1), (*others, length))
    moved = lowering.reshaped(moved, (*others, 1, length))
    places = lowering.view(lowering.value(index), lambda a: np.moveaxis(a, dim, -1), (*others, shape[dim]))
    found = _pick(lowering, moved, lowering.reshaped(places, (*others, shape[dim], 1)), length)
    return lowering.view(found, lambda a: np.moveaxis(a, -1, dim), shape)


@rule("index_put")
def _index_put(lowering: Lowering, node: fx.Node, x: Any, indices: Any, source: Any, accumulate: bool = False) -> Value:
    base, given = lowering.value(x), lowering.value(source)
    if not any(lowering.of_sample(index) for index in indices):
        if len(indices) == 1 and lowering.dtype(indices[0]) is torch.bool:
            mask = lowering.known(indices[0], "a mask")
            if mask.shape == base.shape and not given.shape and not accumulate:
                return lowering.pointwise(Op.SELECT, lowering.literal(mask.float()), given, base)
        target = flat_places(base.shape)[_slices(lowering, indices)]
        spread = lowering.broadcast(given, tuple(target.shape))
        return lowering.scatter(base, target.reshape(-1).numpy(), spread, accumulate)
    if lowering.dtype(indices[0]) is torch.bool and len(indices) == 1 and not given.shape and not accumulate:
        return lowering.pointwise(Op.SELECT, lowering.value(indices[0]), given, base)
    index, first, count = _linear(lowering, base.shape, indices)
    before, after = base.shape[:first], base.shape[first + count :]
    length, many = math.prod(base.shape[first : first + count]), math.prod(index.shape)
    outer, inner = math.prod(before), math.prod(after)
    spread = lowering.broadcast(given, (*before, *index.shape, *after))
    spread = lowering.reshaped(spread, (outer, many, inner))
    spread = lowering.view(spread, lambda a: a.transpose(0, 2, 1)[:, None], (outer, 1, inner, many))
    flat = lowering.reshaped(base, (outer, length, inner))
    places = lowering.reshaped(index, (1, 1, 1, many))
    put = _put(lowering, flat, spread, places, (1, length, 1, 1), accumulate)
    return lowering.reshaped(put, base.shape)


def _put(lowering: Lowering, base: Real, source: Real, index: Real, places: Shape, accumulate: bool) -> Real:
    """`base` with the numbers of the last axis of `source` at the places that `index` names."""
    count = index.shape[-1]
    length = max(places)
    _limit(math.prod(base.shape) * count)
    numbers: Real = lowering.literal(torch.arange(length, dtype=torch.float32, device="cpu").reshape(places))
    if accumulate:
        named = lowering.binary(Op.EQUAL, index, numbers)
        shape = tuple(np.broadcast_shapes(named.shape, source.shape, (*base.shape, count)))
        put = lowering.pointwise(Op.SELECT, lowering.broadcast(named, shape), source, Number(0.0))
        return lowering.binary(Op.ADD, base, lowering.reduce(put, Reduction.SUM, [-1]))
    result = base
    for j in range(count):  # the last one wins
        here, value = (_column(lowering, part, j) for part in (index, source))
        named = lowering.binary(Op.EQUAL, here, lowering.reshaped(numbers, places[:-1]))
        result = lowering.pointwise(Op.SELECT, lowering.broadcast(named, base.shape), value, result)
    return result


def _column(lowering: Lowering, value: Real, j: int) -> Real:
    """[..., j], where the last axis may be one number for all."""
    return lowering.view(value, lambda a: a[..., min(j, a.shape[-1] - 1)], value.shape[:-1])


@rule("scatter_add")
def _scatter_add(lowering: Lowering, node: fx.Node, x: Any, dim: int, index: Any, source: Any) -> Value:
    return _scatter(lowering, x, dim, index, source, True)


@rule("scatter")
def _scatter_over(lowering: Lowering, node: fx.Node, x: Any, dim: int, index: Any, source: Any, **_: Any) -> Value:
    if _.get("reduce") is not None:
        raise LaneError("scatter with a reduction")
    return _scatter(lowering, x, dim, index, source, False)


def _scatter(lowering: Lowering, x: Any, dim: int, index: Any, source: Any, accumulate: bool) -> Value:
    base, given = lowering.value(x), lowering.value(source)
    shape = lowering.shape(index)
    if given.shape and given.shape != shape:
        cut = tuple(slice(n) for n in shape)
        given = lowering.view(given, lambda a: a[cut], shape)
    given = lowering.broadcast(given, shape)
    if not lowering.of_sample(index):
        target = torch.gather(_flat_along(base.shape, shape, dim), dim, lowering.known(index, "an index"))
        return lowering.scatter(base, target.reshape(-1).numpy(), given, accumulate)
    dim %= len(shape)
    if any(a != b for axis, (a, b) in enumerate(zip(shape, base.shape, strict=True)) if axis != dim):
        raise LaneError("a scatter into a part of a tensor, at places that depend on the sample")

    def last(value: Real) -> Real:  # (others, 1, length of the index)
        moved = (*shape[:dim], *shape[dim + 1 :], 1, shape[dim])
        return lowering.view(value, lambda a: np.moveaxis(a, dim, -1)[..., None, :], moved)

    others, length = (*shape[:dim], *shape[dim + 1 :]), base.shape[dim]
    moved = lowering.view(base, lambda a: np.moveaxis(a, dim, -1), (*others, length))
    places = (*(1 for _ in others), length, 1)
    put = _put(lowering, moved, last(given), last(lowering.value(index)), places, accumulate)
    return lowering.view(put, lambda a: np.moveaxis(a, -1, dim), base.shape)


def _flat_along(base: Shape, index: Shape, dim: int) -> Tensor:
    places = flat_places(base)
    for axis, n in enumerate(index):
        if axis != dim % len(index):
            places = places.narrow(axis, 0, n)
    return places


def _scattered(lowering: Lowering, x: Any, source: Any, put: Callable[[Tensor, Tensor], object]) -> Value:
    return _written(lowering, lowering.value(x), lowering.value(source), put)


def _written(lowering: Lowering, x: Value, source: Value, put: Callable[[Tensor, Tensor], object]) -> Value:
    if isinstance(x, Complex) or isinstance(source, Complex):
        a, b = as_complex(x), as_complex(source)
        return Complex(_written(lowering, a.real, b.real, put), _written(lowering, a.imag, b.imag, put))
    into, given = lowering.places(x), lowering.places(source)
    codes: Array = into.codes.copy()
    put(torch.from_numpy(codes), torch.from_numpy(given.codes.copy()))
    return Places(codes, into.buffers | given.buffers)


@rule("slice_scatter")
@rule("slice_scatter", table=COMPLEX_RULES)
def _slice_scatter(
    lowering: Lowering,
    node: fx.Node,
    x: Any,
    source: Any,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Value:
    def put(into: Tensor, given: Tensor) -> None:
        torch.ops.aten.slice.Tensor(into, dim, start, end, step).copy_(given)

    return _scattered(lowering, x, source, put)


@rule("select_scatter")
@rule("select_scatter", table=COMPLEX_RULES)
def _select_scatter(lowering: Lowering, node: fx.Node, x: Any, source: Any, dim: int, index: int) -> Value:
    return _scattered(lowering, x, source, lambda into, given: into.select(dim, index).copy_(given))


@rule("diagonal_scatter")
@rule("diagonal_scatter", table=COMPLEX_RULES)
def _diagonal_scatter(
    lowering: Lowering, node: fx.Node, x: Any, source: Any, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Value:
    return _scattered(lowering, x, source, lambda into, given: into.diagonal(offset, dim1, dim2).copy_(given))


@rule("as_strided_scatter")
@rule("as_strided_scatter", table=COMPLEX_RULES)
def _as_strided_scatter(
    lowering: Lowering, node: Any, x: Any, source: Any, size: Any, stride: Any, offset: int | None = None
) -> Value:
    if not x.meta["val"].is_contiguous():
        raise LaneError("a write by strides into a tensor that is not contiguous")
    return _scattered(lowering, x, source, lambda into, given: into.as_strided(size, stride, offset or 0).copy_(given))


@rule("copy")
def _copy(lowering: Lowering, node: fx.Node, target: Any, source: Any, *_: Any) -> Value:
    return lowering.value(source)


@rule("copy", table=COMPLEX_RULES)
def _copy_complex(lowering: Lowering, node: fx.Node, target: Any, source: Any, *_: Any) -> Value:
    value = as_complex(lowering.value(source))
    wanted = lowering.dtype(node)
    return value if wanted is not None and wanted.is_complex else value.real
