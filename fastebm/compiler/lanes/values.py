"""What lowering knows of a tensor: where its numbers lie, or how they are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, fx

from fastebm.ops.lanes import MAX_REGISTERS, Op, Reduction

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]

# A number of a sample has one code: the index of its buffer in the high bits, its place in the buffer in the low ones.
PLACE_BITS = 32
PLACE_MASK = (1 << PLACE_BITS) - 1


@dataclass(eq=False)
class Buffer:
    """Numbers of a sample that one item writes. Planning says how long it is needed and where it lies in the arena."""

    size: int
    made_at: int
    last: int = -1
    start: int = -1


@dataclass(eq=False)
class Places:
    """A tensor of a sample whose numbers lie in `buffers`, one code for each."""

    codes: Array
    buffers: frozenset[int]

    @property
    def shape(self) -> Shape:
        return self.codes.shape

    def viewed(self, view: Callable[[Array], Array]) -> Places:
        return Places(view(self.codes), self.buffers)

    @staticmethod
    def joined(parts: Sequence[Places], join: Callable[[list[Array]], Array]) -> Places:
        return Places(join([part.codes for part in parts]), frozenset().union(*(part.buffers for part in parts)))


@dataclass(eq=False)
class Pointwise:
    """A tensor of a sample that an operation makes of others of the same shape, within a loop."""

    op: Op
    inputs: tuple[Any, ...]
    number: float
    shape: Shape
    group: Group
    stored: Places | None = None


@dataclass(eq=False)
class Constant:
    """A tensor that doesn't depend on x: numbers at places of the program's constants."""

    places: Array

    @property
    def shape(self) -> Shape:
        return self.places.shape

    def viewed(self, view: Callable[[Array], Array]) -> Constant:
        return Constant(view(self.places))


@dataclass(eq=False)
class Number:
    """A tensor all of whose elements are one number, known while lowering."""

    value: float
    shape: Shape = ()


@dataclass(eq=False)
class Complex:
    """A complex tensor, by its two parts of one shape."""

    real: Value
    imag: Value

    @property
    def shape(self) -> Shape:
        return self.real.shape


class Deferred(ABC):
    """What a rule gives for others that know it; as a value of its own it is worked out when it is asked for."""

    @abstractmethod
    def value(self) -> Real: ...


Real = Places | Pointwise | Constant | Number
Value = Any  # one of the above, or a list of them where an operation has several results


@dataclass(eq=False)
class Group:
    """A loop that is being built: all its values have one index space.

    `order` lists the axes of the rows, `rows` many, and then those that are reduced. It is open until a reduction.
    """

    position: int
    shape: Shape
    order: tuple[int, ...] | None = None
    rows: int = -1
    nodes: list[Pointwise] = field(default_factory=list)
    outputs: list[tuple[Reduction, Pointwise, Places]] = field(default_factory=list)
    external: set[int] = field(default_factory=set)  # ids of inputs that are not nodes of the group
    known: dict[Any, Pointwise] = field(default_factory=dict)

    def has_room(self) -> bool:
        """For one more node of up to three inputs, so that registers suffice whatever the order."""
        return len(self.nodes) + len(self.external) + 4 <= MAX_REGISTERS

    def reductions(self) -> int:
        return sum(kind is not Reduction.STORE for kind, _, _ in self.outputs)

    def runs_in(self, order: tuple[int, ...], rows: int) -> bool:
        """Whether a reduction with these axes can share the loop. Axes of length one don't matter."""
        if self.order is None:
            return True

        def real(axes: Sequence[int]) -> list[int]:
            return [axis for axis in axes if self.shape[axis] != 1]

        mine, wanted = (real(self.order[: self.rows]), real(self.order[self.rows :])), (order[:rows], order[rows:])
        return mine == (real(wanted[0]), real(wanted[1]))

    def reads(self) -> list[Places]:
        return [value for node in self.nodes for value in node.inputs if isinstance(value, Places)]


@dataclass(eq=False)
class Sums:
    """Codes of a matrix of numbers in one buffer: row[r] + depth[k]."""

    row: Array
    depth: Array
    buffers: frozenset[int]


@dataclass(eq=False)
class ProductItem:
    """A matrix of the sample times a constant one, plus `bias`, which is -1 or where C constants begin."""

    source: Sums
    weight: int
    out: Places
    bias: int = -1

    def reads(self) -> list[Places]:
        return [Places(self.source.row, self.source.buffers)]


@dataclass(eq=False)
class PairItem:
    """Matrices of the sample times others, (B, I, K) by (B, K, J)."""

    left: Sums
    right: Sums
    out: Places

    def reads(self) -> list[Places]:
        return [Places(side.row, side.buffers) for side in (self.left, self.right)]


@dataclass(eq=False)
class ScanItem:
    """Running sums along the last axis of (R, N)."""

    source: Places
    out: Places

    def reads(self) -> list[Places]:
        return [self.source]


@dataclass(eq=False)
class FillItem:
    """A number that is written once, for paddings."""

    number: float
    out: Places

    def reads(self) -> list[Places]:
        return []


Item = Group | ProductItem | PairItem | ScanItem | FillItem


@dataclass(frozen=True)
class Packed:
    """Constants of a program: `pack` of what `source` evaluates to, from place `start` on."""

    start: int
    source: fx.Node | Tensor
    pack: Callable[[Tensor], Tensor]
