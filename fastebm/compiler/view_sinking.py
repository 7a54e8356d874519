"""Views of images sink behind the operations that commute with them, so that these work on the image itself.

Research code sums over the pixels of `h.view(B, C, -1)` and applies a linear map to `h.permute(0, 2, 3, 1)`. Fused
programs have instructions for images and vectors only, and there these are a sum over a window and a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastebm.compiler import operations as op
from fastebm.compiler.lazy_tensors import LazyTensor, Shape, lazy
from fastebm.compiler.program import Builder, Node, Program, eliminate_dead_code

__all__ = ["sink_views"]

Axes = tuple[int, ...]
POINTWISE = (op.Activation, op.LinearCombination, op.Multiply, op.Affine)


@dataclass(frozen=True)
class _View:
    """A result as a view of an image.

    Attributes:
        source: the image, by its name in the new program.
        groups: for each dimension of the view the axes of the image that it consists of, the slowest first. Axes of
            length 1 may be left out.
        extents: the lengths of the axes before they were summed over.
    """

    source: str
    groups: tuple[Axes, ...]
    extents: Shape

    @property
    def order(self) -> Axes:
        return tuple(axis for group in self.groups for axis in group)


def sink_views(program: Program) -> Program:
    """The program with reshapes and permutations of images as late as possible, or without them."""
    return _Sinking(program).result()


class _Sinking:
    """Rebuilds a program node by node. A result lies in the new program, or is a view, or both."""

    def __init__(self, program: Program):
        self.program = program
        self.builder = Builder(reserved=[node.name for node in program])
        self.views: dict[str, _View] = {}
        self.names: dict[str, str] = {}

    def result(self) -> Program:
        for node in self.program:
            view = self._sunk(node)
            if isinstance(view, str):
                self.names[node.name] = view
            elif view is None:
                inputs = [self._plain(name) for name in node.inputs]
                self.names[node.name] = self.builder.add_exact(node.operation, *inputs, name=node.name)
            elif view.groups == ((0,), (1,), (2,)) and self.builder.shape(view.source) == node.shape:
                self.names[node.name] = view.source
            elif view.order == tuple(sorted(view.order)) and len(node.shape) < 2:
                # Vectors lie as images where they have to, see `lowering.layout`.
                reshape = op.Reshape(node.shape)
                self.names[node.name] = self.builder.add_exact(reshape, view.source, name=node.name)
            else:
                self.views[node.name] = view
        outputs = tuple(self._plain(name) for name in self.program.outputs)
        return eliminate_dead_code(Program(tuple(self.builder.nodes), outputs))

    def _plain(self, name: str) -> str:
        """The result by its name in the new program, to which it is added if it is only a view so far."""
        if name not in self.names:
            view = self.views[name]
            last = [axis for axis in range(3) if axis not in view.order]  # of length 1
            order = (*view.order, *last)
            source = view.source
            if [a for a in order if a not in last] != sorted(view.order):
                source = self.builder.add(op.Permute(order), source, name=name)
            self.names[name] = self.builder.add(op.Reshape(self.program[name].shape), source, name=name)
        return self.names[name]

    def _view(self, name: str) -> _View | None:
        """The result as a view; an image is one of itself."""
        if name in self.views:
            return self.views[name]
        shape = self.program[name].shape
        return _View(self.names[name], ((0,), (1,), (2,)), shape) if len(shape) == 3 else None

    def _shape(self, view: _View) -> Shape:
        return self.builder.shape(view.source)

    def _add(self, node: Node, operation: op.Operation, *sources: str) -> str:
        return self.builder.add(operation, *sources, name=node.name)

    def _sunk(self, node: Node) -> _View | str | None:
        """The result of a node as a view, or its name, or None if it has to be computed from its inputs as they are."""
        operation, views = node.operation, [self._view(name) for name in node.inputs]
        if not views or any(view is None for view in views):
            return None
        first = views[0]
        assert first is not None
        if isinstance(operation, op.Reshape):
            return self._reshaped(first, node.shape)
        if isinstance(operation, op.Permute):
            return _View(first.source, tuple(first.groups[dim] for dim in operation.order), first.extents)
        if not any(name in self.views for name in node.inputs):
            return None  # images, as they were
        same = [v for v in views if v is not None and self._alike(v, first)]
        if isinstance(operation, POINTWISE):
            return self._pointwise(node, same) if len(same) == len(views) else None
        if isinstance(operation, op.Linear):
            return self._linear(node, operation, first)
        if isinstance(operation, op.Sum):
            axes = tuple(sorted(axis for dim in operation.dims for axis in first.groups[dim]))
            source = self._add(node, op.Sum(axes), first.source) if axes else first.source
            return _View(source, first.groups, first.extents)
        if isinstance(operation, op.Broadcast):
            return self._broadcast(node, first)
        if isinstance(operation, op.Slice | op.LogSumExp | op.Softmax):
            return self._along(node, operation, first)
        return None

    def _alike(self, a: _View, b: _View) -> bool:
        return (a.groups, a.extents, self._shape(a)) == (b.groups, b.extents, self._shape(b))

    def _reshaped(self, view: _View, target: Shape) -> _View | None:
        """The same numbers in another shape, if each dimension of it is whole axes."""
        shape = self._shape(view)
        axes = [axis for axis in view.order if shape[axis] > 1]
        groups = []
        for length in target:
            group: list[int] = []
            while math.prod(shape[axis] for axis in group) < length and axes:
                group.append(axes.pop(0))
            if math.prod(shape[axis] for axis in group) != length:
                return None
            groups.append(tuple(group))
        return _View(view.source, tuple(groups), view.extents)

    def _pointwise(self, node: Node, views: Sequence[_View]) -> _View:
        operation, first = node.operation, views[0]
        if isinstance(operation, op.Affine):
            scale, shift = (self._weight(w, first) for w in (operation.scale, operation.shift))
            operation = op.Affine(scale, shift)
        return _View(self._add(node, operation, *(v.source for v in views)), first.groups, first.extents)

    def _weight(self, weight: LazyTensor | None, view: _View) -> LazyTensor | None:
        """A tensor that broadcasts with a view, for its image."""
        if weight is None or math.prod(weight.shape) == 1:
            return weight
        return lazy(_as_image, weight, view.groups, self._shape(view))

    def _linear(self, node: Node, linear: op.Linear, view: _View) -> _View | str | None:
        """A linear map over channels is a convolution; one of all pixels in another order has its weight reordered."""
        channels, *_ = shape = self._shape(view)
        if view.groups[-1] == (0,) or (not view.groups[-1] and 0 not in view.order and channels == 1):
            weight = lazy(Tensor.reshape, linear.weight, (-1, channels, 1, 1))
            source = self._add(node, op.Convolution(weight, linear.bias), view.source)
            extents = (weight.shape[0], *view.extents[1:])
            return _View(source, (*view.groups[:-1], (0,)), extents)
        if len(view.groups) != 1:
            return None
        flat = self._add(node, op.Reshape((math.prod(shape),)), view.source)
        weight = lazy(_columns_of_image, linear.weight, view.order, shape)
        return self._add(node, op.Linear(weight, linear.bias), flat)

    def _broadcast(self, node: Node, view: _View) -> _View | None:
        """Axes that were summed over get back their lengths, by the dimension that they were in or are alone left."""
        before, target = self.program[node.inputs[0]].shape, node.shape
        shape, groups = list(self._shape(view)), list(view.groups)
        stretched = [dim for dim, n in enumerate(before) if n != target[dim]]
        free = tuple(axis for axis in range(3) if axis not in view.order)
        for dim in stretched:
            axes = groups[dim] or (free if len(stretched) == 1 else ())
            if not axes or math.prod(view.extents[axis] for axis in axes) != target[dim]:
                return None
            groups[dim] = axes
            for axis in axes:
                shape[axis] = view.extents[axis]
        return _View(self._add(node, op.Broadcast(tuple(shape)), view.source), tuple(groups), view.extents)

    def _along(self, node: Node, operation: op.Slice | op.LogSumExp | op.Softmax, view: _View) -> _View | None:
        """What works along one dimension, if that is one axis."""
        if len(view.groups[operation.dim]) != 1:
            return None
        (axis,) = view.groups[operation.dim]
        extents = list(view.extents)
        if isinstance(operation, op.Slice):
            moved: op.Operation = op.Slice(axis, operation.start, operation.stop)
            extents[axis] = operation.stop - operation.start
        else:
            moved = type(operation)(axis)
        return _View(self._add(node, moved, view.source), view.groups, tuple(extents))


# ---- weights


def _as_image(weight: Tensor, groups: tuple[Axes, ...], shape: Shape) -> Tensor:
    """A tensor that broadcasts over a view, as one of three dimensions that broadcasts over its image."""
    weight = weight.reshape((1,) * (len(groups) - weight.dim()) + tuple(weight.shape))
    order = [axis for group in groups for axis in group]
    lengths: list[int] = []
    for group, n in zip(groups, weight.shape, strict=True):
        lengths += [1 if n == 1 else shape[axis] for axis in group]
    rest = [axis for axis in range(3) if axis not in order]
    spread = weight.reshape(*lengths, *(1 for _ in rest))
    return spread.permute([(order + rest).index(axis) for axis in range(3)])


def _columns_of_image(weight: Tensor, order: Axes, shape: Shape) -> Tensor:
    """The weight of a linear map of all numbers of an image in the order of some axes, for the order of the image."""
    rest = [axis for axis in range(3) if axis not in order]
    axes = [*order, *rest]
    split = weight.reshape(-1, *(shape[axis] for axis in axes))
    return split.permute(0, *(axes.index(axis) + 1 for axis in range(3))).reshape(weight.shape)
