"""Builds the items of a lane program: loops that pointwise operations share, products, scans, constants."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

from fastebm.ops.lanes import PANEL, Op, Reduction, pack_matrix

from .recording import LaneError
from .values import (
    PLACE_BITS,
    Array,
    Buffer,
    Complex,
    Constant,
    FillItem,
    Group,
    Item,
    Number,
    Packed,
    PairItem,
    Places,
    Pointwise,
    ProductItem,
    Real,
    ScanItem,
    Shape,
    Sums,
)

# What C++ keeps of the reductions of one loop: kMaxReductions in csrc/cpu/lanes.h.
MAX_REDUCTIONS = 8

_SMALLEST, _LARGEST = 1e-37, 1e38

_WITH_NUMBER = {
    Op.ADD: Op.ADD_NUMBER,
    Op.MULTIPLY: Op.MULTIPLY_NUMBER,
    Op.MINIMUM: Op.MINIMUM_NUMBER,
    Op.MAXIMUM: Op.MAXIMUM_NUMBER,
    Op.LESS: Op.LESS_NUMBER,
    Op.LESS_EQUAL: Op.LESS_EQUAL_NUMBER,
    Op.EQUAL: Op.EQUAL_NUMBER,
    Op.NOT_EQUAL: Op.NOT_EQUAL_NUMBER,
    Op.GREATER: Op.GREATER_NUMBER,
    Op.GREATER_EQUAL: Op.GREATER_EQUAL_NUMBER,
}
_SWAPPED = {
    Op.LESS: Op.GREATER,
    Op.LESS_EQUAL: Op.GREATER_EQUAL,
    Op.GREATER: Op.LESS,
    Op.GREATER_EQUAL: Op.LESS_EQUAL,
    Op.ADD: Op.ADD,
    Op.MULTIPLY: Op.MULTIPLY,
    Op.EQUAL: Op.EQUAL,
    Op.NOT_EQUAL: Op.NOT_EQUAL,
    Op.MINIMUM: Op.MINIMUM,
    Op.MAXIMUM: Op.MAXIMUM,
}
_FOLDED_UNARY: dict[Op, Callable[[float, float], float]] = {
    Op.COPY: lambda x, n: x,
    Op.NEGATE: lambda x, n: -x,
    Op.SQUARE: lambda x, n: x * x,
    Op.MULTIPLY_NUMBER: lambda x, n: x * n,
    Op.ADD_NUMBER: lambda x, n: x + n,
    Op.NUMBER_MINUS: lambda x, n: n - x,
}
_FOLDED: dict[Op, Callable[[float, float], float]] = {
    Op.MULTIPLY: operator.mul,
    Op.ADD: operator.add,
    Op.SUBTRACT: operator.sub,
    Op.EQUAL: operator.eq,
    Op.NOT_EQUAL: operator.ne,
    Op.LESS: operator.lt,
    Op.GREATER: operator.gt,
    Op.LESS_EQUAL: operator.le,
    Op.GREATER_EQUAL: operator.ge,
}


class Builder:
    """Items in the order in which they run, the buffers that they write, and the constants that they read."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.buffers: list[Buffer] = []
        self.packed: list[Packed] = []
        self.constant_size = 0
        self._starts: dict[Any, int] = {}
        self._fillers: dict[bytes, FillItem] = {}

    # ---- numbers in the arena

    def new_places(self, shape: Shape, made_at: int) -> Places:
        """New numbers, which the item at position `made_at` writes."""
        index, size = len(self.buffers), math.prod(shape)
        self.buffers.append(Buffer(size, made_at))
        base = index << PLACE_BITS
        return Places(np.arange(base, base + size, dtype=np.int64).reshape(shape), frozenset((index,)))

    def filler(self, number: float) -> Places:
        """One number in the arena, of shape ()."""
        key = np.float32(number).tobytes()
        if key not in self._fillers:
            self._fillers[key] = FillItem(number, self.new_places((), -1))
        return self._fillers[key].out

    def fillers(self) -> list[Item]:
        return list(self._fillers.values())

    def places(self, value: Real) -> Places:
        """A value in the arena."""
        if isinstance(value, Places):
            return value
        if 0 in value.shape:
            return Places(np.zeros(value.shape, np.int64), frozenset())
        if isinstance(value, Complex):
            raise LaneError("an operation on complex numbers")
        if isinstance(value, Number):
            shape = value.shape
            return self.filler(value.value).viewed(lambda a: np.broadcast_to(a, shape))
        if not isinstance(value, Pointwise):
            value = self.copied(value)
        return self._store(value)

    def copied(self, value: Real) -> Pointwise:
        made = self.loop_over(Op.COPY, (value,))
        assert isinstance(made, Pointwise)
        return made

    def stored(self, value: Real) -> Places:
        """The value in one buffer, in the order of its shape."""
        if isinstance(value, Pointwise):
            return self._store(value)
        return self._store(self.copied(value))

    def _store(self, value: Pointwise) -> Places:
        if value.stored is None:
            value.stored = self.new_places(value.shape, value.group.position)
            value.group.outputs.append((Reduction.STORE, value, value.stored))
        return value.stored

    # ---- constants

    def constant(self, source: fx.Node | Tensor, shape: Shape, pack: Callable[[Tensor], Tensor], kind: Any) -> Constant:
        """A tensor of the program's constants: what `pack`, which goes by the name `kind`, makes of `source`."""
        size = math.prod(shape)
        key = (source, kind) if isinstance(source, fx.Node) else (id(source), kind)
        start = self._starts.get(key)
        if start is None:
            start = self._starts[key] = self.constant_size
            self.packed.append(Packed(start, source, pack))
            self.constant_size += size
        return Constant(np.arange(start, start + size, dtype=np.int64).reshape(shape))

    def literal(self, tensor: Tensor) -> Constant | Number:
        """A constant of the lowering's own."""
        first = tensor.flatten()[:1]
        if tensor.numel() and bool((tensor == first).all()):
            return Number(float(first), tuple(tensor.shape))
        return self.constant(tensor, tuple(tensor.shape), _flat, "plain")

    # ---- views

    def view(self, value: Real, view: Callable[[Array], Array], shape: Shape) -> Real:
        if isinstance(value, Number):
            return Number(value.value, shape)
        if isinstance(value, Constant):
            return value.viewed(view)
        return self.places(value).viewed(view)

    def broadcast(self, value: Real, shape: Shape) -> Real:
        if value.shape == shape:
            return value
        return self.view(value, lambda a: np.broadcast_to(a, shape), shape)

    def reshaped(self, value: Real, shape: Shape) -> Real:
        return value if value.shape == shape else self.view(value, lambda a: a.reshape(shape), shape)

    # ---- pointwise operations

    def pointwise(self, op: Op, *inputs: Real, number: float = 0.0) -> Real:
        """An operation on values that are broadcast against one another."""
        shape = tuple(np.broadcast_shapes(*(value.shape for value in inputs)))
        first = inputs[0]
        if 0 in shape:
            return Number(0.0, shape)
        if len(inputs) == 1 and isinstance(first, Number) and op in _FOLDED_UNARY:
            return Number(_FOLDED_UNARY[op](first.value, number), shape)
        if op is Op.NEGATE and isinstance(first, Pointwise) and first.op is Op.NEGATE:
            return first.inputs[0]
        return self.loop_over(op, tuple(self.broadcast(value, shape) for value in inputs), number)

    def loop_over(self, op: Op, inputs: tuple[Real, ...], number: float = 0.0) -> Pointwise:
        """The operation in the first loop of its shape that runs late enough."""
        shape = inputs[0].shape
        number = float(np.float32(number))
        earliest = 0
        for value in inputs:
            if isinstance(value, Pointwise):
                earliest = max(earliest, value.group.position)
            elif isinstance(value, Places):
                earliest = max([earliest, *(self.buffers[b].made_at + 1 for b in value.buffers)])
        for item in self.items[earliest:]:
            if isinstance(item, Group) and item.shape == shape and item.has_room():
                return self._in_group(item, op, inputs, number)
        return self._in_group(self.new_group(shape), op, inputs, number)

    def new_group(self, shape: Shape) -> Group:
        group = Group(len(self.items), shape)
        self.items.append(group)
        return group

    def _in_group(self, group: Group, op: Op, inputs: tuple[Real, ...], number: float) -> Pointwise:
        # A value of an earlier loop has to be read from the arena.
        inputs = tuple(self._store(v) if isinstance(v, Pointwise) and v.group is not group else v for v in inputs)
        key = (op, tuple(map(_identity, inputs)), number, math.copysign(1.0, number))
        found = group.known.get(key)
        if found is None:
            found = group.known[key] = Pointwise(op, inputs, number, group.shape, group)
            group.nodes.append(found)
            group.external |= {id(v) for v in inputs if not isinstance(v, Pointwise)}
        return found

    def binary(self, op: Op, a: Real, b: Real) -> Real:
        """An operation on two values, where numbers are parts of the operation."""
        if isinstance(a, Number) and isinstance(b, Number) and op in _FOLDED:
            return Number(float(_FOLDED[op](a.value, b.value)), tuple(np.broadcast_shapes(a.shape, b.shape)))
        if isinstance(a, Number) and op in _SWAPPED:
            op, a, b = _SWAPPED[op], b, a
        shape = tuple(np.broadcast_shapes(a.shape, b.shape))
        if isinstance(b, Number):
            return self._with_number(op, self.broadcast(a, shape), b.value)
        if isinstance(a, Number) and op in (Op.SUBTRACT, Op.DIVIDE):
            turned = Op.NUMBER_MINUS if op is Op.SUBTRACT else Op.NUMBER_OVER
            return self.pointwise(turned, self.broadcast(b, shape), number=a.value)
        return self.pointwise(op, a, b)

    def _with_number(self, op: Op, a: Real, number: float) -> Real:
        if op is Op.SUBTRACT:
            op, number = Op.ADD, -number
        if op is Op.DIVIDE and number != 0 and math.isfinite(number) and abs(math.frexp(number)[0]) == 0.5:
            op, number = Op.MULTIPLY, 1 / number
        if (op in (Op.MULTIPLY, Op.DIVIDE) and number == 1) or (op is Op.ADD and number == 0):
            return a
        if op is Op.MULTIPLY and number == -1:
            return self.pointwise(Op.NEGATE, a)
        if op is Op.MULTIPLY and isinstance(a, Pointwise) and a.op is Op.MULTIPLY_NUMBER:
            product = a.number * number
            if _SMALLEST < abs(product) < _LARGEST:  # else zeros and infinities could come of it
                return self._with_number(op, a.inputs[0], product)
        if op is Op.POWER:
            return self.power(a, number)
        if op in _WITH_NUMBER:
            return self.pointwise(_WITH_NUMBER[op], a, number=number)
        return self.pointwise(op, a, Number(number))

    def power(self, a: Real, exponent: float) -> Real:
        """The whole part by products, which lose less than the logarithm of a large number."""
        if exponent == 0:
            return Number(1.0, a.shape)
        if exponent == -0.5:
            return self.pointwise(Op.RECIPROCAL_ROOT, a)
        if not math.isfinite(exponent) or abs(exponent) > 64:
            return self.pointwise(Op.POWER_NUMBER, a, number=exponent)
        whole = int(abs(exponent))
        rest = abs(exponent) - whole
        factors = []
        if rest == 0.5:
            factors.append(self.pointwise(Op.SQUARE_ROOT, a))
        elif rest:
            factors.append(self.pointwise(Op.POWER_NUMBER, a, number=rest))
        square = a
        while whole:
            if whole & 1:
                factors.append(square)
            whole >>= 1
            if whole:
                square = self.pointwise(Op.SQUARE, square)
        result = functools.reduce(functools.partial(self.pointwise, Op.MULTIPLY), factors)
        return result if exponent > 0 else self.pointwise(Op.RECIPROCAL, result)

    # ---- reductions

    def reduce(self, value: Real, reduction: Reduction, dims: Sequence[int], keep: bool = False) -> Real:
        """Over the axes `dims`."""
        ndim = len(value.shape)
        reduced = {d % ndim for d in dims} if ndim else set()
        final = tuple(1 if d in reduced else n for d, n in enumerate(value.shape) if keep or d not in reduced)
        count = math.prod(value.shape[d] for d in reduced)
        if count == 1:
            return self.reshaped(value, final)
        if isinstance(value, Number) and reduction is not Reduction.PRODUCT:
            return Number(value.value * count if reduction is Reduction.SUM else value.value, final)
        order = (*(d for d in range(ndim) if d not in reduced), *sorted(reduced))
        rows = ndim - len(reduced)
        made = value if isinstance(value, Pointwise) else self.copied(value)
        if not made.group.runs_in(order, rows) or made.group.reductions() >= MAX_REDUCTIONS:
            made = self._in_group(self.new_group(made.shape), Op.COPY, (self.stored(made),), 0.0)
        group = made.group
        if group.order is None:
            group.order, group.rows = order, rows
        out = self.new_places(tuple(made.shape[d] for d in order[:rows]), group.position)
        group.outputs.append((reduction, made, out))
        return self.reshaped(out, final)

    def scan(self, value: Real, dim: int) -> Places:
        """Running sums along an axis."""
        moved = self.places(value).viewed(lambda a: np.moveaxis(a, dim, -1))
        out = self.new_places(moved.shape, len(self.items))
        length = moved.shape[-1]
        rows, target = (v.viewed(lambda a: a.reshape(-1, length)) for v in (moved, out))
        self.items.append(ScanItem(rows, target))
        return out.viewed(lambda a: np.moveaxis(a, -1, dim))

    # ---- products

    def sums(self, value: Places) -> Sums:
        """(R, K) numbers as a matrix whose codes are sums of one of the row and one of the column; copied if not so."""
        codes = value.codes
        row, depth = codes[:, 0], codes[0] - codes[0, 0]
        one = len(value.buffers) == 1
        if not one or not (codes == row[:, None] + depth).all():
            codes = self.stored(value).codes
            value = Places(codes, frozenset((int(codes.flat[0]) >> PLACE_BITS,)))
        return Sums(codes[:, 0], codes[0] - codes[0, 0], value.buffers)

    def product(
        self,
        left: Sums,
        weight: fx.Node | Tensor,
        shape: Shape,
        select: Callable[[Tensor], Tensor],
        kind: Any,
        bias: int = -1,
    ) -> Places:
        """A matrix of the sample times `select(weight)`, (K, C) of shape `shape`; `kind` names what is selected.

        C constants from the place `bias` on are added.
        """
        depth, columns = shape
        size = depth * -(-columns // PANEL) * PANEL
        constant = self.constant(weight, (size,), lambda t: pack_matrix(select(t)), ("matrix", kind))
        out = self.new_places((len(left.row), columns), len(self.items))
        self.items.append(ProductItem(left, int(constant.places[0]), out, bias))
        return out

    def pair_product(self, left: Real, right: Real) -> Places:
        """(B, I, K) times (B, K, J)."""
        count, rows, depth = left.shape
        columns = right.shape[2]
        a = self.sums(self.places(left).viewed(lambda v: v.reshape(-1, depth)))
        b = self.sums(self.places(right).viewed(lambda v: v.transpose(0, 2, 1).reshape(-1, depth)))
        out = self.new_places((count, rows, columns), len(self.items))
        self.items.append(PairItem(a, b, out))
        return out

    # ---- placing numbers among others

    def padded(self, value: Real, padding: Sequence[tuple[int, int]], number: float = 0.0) -> Places:
        """With `number` around; a negative padding cuts."""
        given, fill = self.places(value), self.filler(number)
        cut = tuple(slice(max(-low, 0), n - max(-high, 0)) for (low, high), n in zip(padding, given.shape, strict=True))
        grown = [(max(low, 0), max(high, 0)) for low, high in padding]
        codes = np.pad(given.codes[cut], grown, constant_values=int(fill.codes))
        return Places(codes, given.buffers | fill.buffers)

    def scatter(self, base: Real, target: Array, source: Real, accumulate: bool) -> Real:
        """`base` with the numbers of `source` written or added at the flat places `target`."""
        given = self.places(source).viewed(lambda a: a.reshape(-1))
        size = math.prod(base.shape)
        counts = np.bincount(target, minlength=size)
        most = int(counts.max(initial=0))
        empty = isinstance(base, Number) and base.value == 0
        if not accumulate or (empty and most <= 1):
            into = self.places(base)
            codes = into.codes.reshape(-1).copy()
            codes[target] = given.codes
            return Places(codes.reshape(base.shape), into.buffers | given.buffers)
        zero = self.filler(0.0)
        codes = np.full((size, most), int(zero.codes))
        order = np.argsort(target, kind="stable")
        within = np.arange(len(target)) - np.concatenate([[0], np.cumsum(counts)])[target[order]]
        codes[target[order], within] = given.codes[order]
        added = self.reduce(Places(codes, given.buffers | zero.buffers), Reduction.SUM, [1])
        added = self.reshaped(added, base.shape)
        return added if empty else self.pointwise(Op.ADD, base, added)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def _identity(value: Real) -> Any:
    """Equal for values that are the same."""
    return ("number", value.value, math.copysign(1.0, value.value)) if isinstance(value, Number) else id(value)
