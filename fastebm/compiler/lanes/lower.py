"""Lowers the graph of one sample to a lane program: views become addresses, pointwise operations share loops."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fastebm.ops.lanes import (
    Instruction,
    LaneProgram,
    Map,
    Micro,
    Op,
    Operand,
    Output,
    PairProduct,
    Product,
    Reduction,
    Scan,
    Space,
    pack_matrix,
)

from .trace import JointGraph

aten = torch.ops.aten


class LaneError(ValueError):
    """An operation that lane programs have no instruction for."""


# ---- values


@dataclass(eq=False)
class Buffer:
    """Numbers of a sample in the arena; `start` is known after planning."""

    size: int
    first: int = 1 << 60
    last: int = -1
    start: int = -1


@dataclass(eq=False)
class Places:
    """A tensor of a sample whose numbers lie in buffers: for each, the buffer's index and the place in it."""

    buffers: np.ndarray[Any, Any]
    places: np.ndarray[Any, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.buffers.shape

    def viewed(self, view: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Places:
        return Places(view(self.buffers), view(self.places))


@dataclass(eq=False)
class Pointwise:
    """A tensor of a sample that an operation makes of others of the same shape, not computed yet."""

    op: Op
    inputs: tuple[Any, ...]
    number: float
    shape: tuple[int, ...]
    stored: Places | None = None
    group: Any = None
    register: int = -1


@dataclass(eq=False)
class Constant:
    """A tensor that doesn't depend on x: a node that is evaluated once a chain, seen through a view of places."""

    node: int
    places: np.ndarray[Any, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places.shape


@dataclass(eq=False)
class Number:
    """A tensor all of whose elements are one known number."""

    value: float
    shape: tuple[int, ...]


Value = Any


@dataclass(eq=False)
class Group:
    """A map that is being built: all its values have one index space."""

    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None  # axes of the rows, then those that are reduced
    rows: int = -1  # how many of `order` are of the rows
    nodes: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)  # (reduction, value, places)


@dataclass(frozen=True)
class Lowered:
    """A lane program, and the tensors that its constants are packed from.

    Attributes:
        program: the program.
        graph: evaluates the constants: a module from the weights to a list of tensors.
        packing: for each constant the place in the flat tensor, and how it is packed.
    """

    program: LaneProgram
    constants: list[tuple[int, Callable[[Tensor], Tensor]]]
    evaluate: fx.GraphModule
    size: int
    weights: list[str | Tensor]
    numbers: list[float]


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
    "floor": Op.FLOOR,
    "ceil": Op.CEIL,
    "round": Op.ROUND,
    "trunc": Op.TRUNCATE,
    "logical_not": Op.LOGICAL_NOT,
    "bitwise_not": Op.LOGICAL_NOT,
    "isnan": Op.IS_NAN,
    "square": Op.SQUARE,
}
_BINARY = {
    "add": Op.ADD,
    "sub": Op.SUBTRACT,
    "mul": Op.MULTIPLY,
    "div": Op.DIVIDE,
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
    "bitwise_and": Op.LOGICAL_AND,
    "logical_or": Op.LOGICAL_OR,
    "bitwise_or": Op.LOGICAL_OR,
    "remainder": Op.REMAINDER,
}
_WITH_NUMBER = {
    Op.ADD: Op.ADD_NUMBER,
    Op.MULTIPLY: Op.MULTIPLY_NUMBER,
    Op.MINIMUM: Op.MINIMUM_NUMBER,
    Op.MAXIMUM: Op.MAXIMUM_NUMBER,
    Op.POWER: Op.POWER_NUMBER,
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
_REDUCTIONS = {
    "sum": Reduction.SUM,
    "amax": Reduction.MAXIMUM,
    "amin": Reduction.MINIMUM,
    "prod": Reduction.PRODUCT,
    "max": Reduction.MAXIMUM,
    "min": Reduction.MINIMUM,
    "any": Reduction.MAXIMUM,
    "all": Reduction.MINIMUM,
}
_SAME = {"alias", "clone", "detach", "lift_fresh_copy", "lift_fresh", "contiguous", "_to_copy"}


class Lowering:
    def __init__(self, traced: JointGraph) -> None:
        self.traced = traced
        self.values: dict[fx.Node, Value] = {}
        self.order: list[Any] = []  # groups and instructions still without addresses
        self.buffers: list[Buffer] = []
        self.lazy: set[fx.Node] = set()  # nodes that depend on weights only
        self.static: dict[fx.Node, Any] = {}  # nodes that depend on nothing
        self.constants: list[tuple[fx.Node, Callable[[Tensor], Tensor], int]] = []
        self.constant_size = 0
        self.constant_starts: dict[Any, int] = {}
        self.made_at: dict[int, int] = {}  # buffer -> position in order

    # ---- values

    def new_buffer(self, size: int, position: int) -> int:
        self.buffers.append(Buffer(size))
        self.made_at[len(self.buffers) - 1] = position
        return len(self.buffers) - 1

    def contiguous(self, shape: tuple[int, ...], position: int) -> Places:
        size = math.prod(shape)
        buffer = self.new_buffer(size, position)
        return Places(np.full(shape, buffer, np.int64), np.arange(size, dtype=np.int64).reshape(shape))

    def zeros(self, shape: tuple[int, ...]) -> Places:
        """Zeros in the arena, all at one address."""
        if not hasattr(self, "_zero"):
            self._zero = self.new_buffer(1, -1)
            self.order.insert(0, ("zero", self._zero))
            for key in self.made_at:
                self.made_at[key] += 1
            self.made_at[self._zero] = 0
        return Places(np.full(shape, self._zero, np.int64), np.zeros(shape, np.int64))

    def places(self, value: Value) -> Places:
        """A value in the arena."""
        if isinstance(value, Places):
            return value
        if isinstance(value, Number) and value.value == 0:
            return self.zeros(value.shape)
        if isinstance(value, Pointwise) and value.stored is not None:
            return value.stored
        if not isinstance(value, Pointwise):
            value = self.pointwise(Op.COPY, (value,))
        return self.store(value)

    def store(self, value: Pointwise) -> Places:
        if value.stored is None:
            position = self.order.index(value.group)
            shape = value.shape
            buffer = self.new_buffer(math.prod(shape), position)
            value.stored = Places(
                np.full(shape, buffer, np.int64), np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
            )
            value.group.outputs.append((Reduction.STORE, value, value.stored))
        return value.stored

    def position_of(self, value: Value) -> int:
        """The first position in the order at which the value can be read."""
        if isinstance(value, Places):
            return max((self.made_at[int(b)] for b in np.unique(value.buffers)), default=-1)
        if isinstance(value, Pointwise):
            return self.order.index(value.group)
        return -1

    def pointwise(self, op: Op, inputs: Sequence[Value], number: float = 0.0) -> Any:
        shape = tuple(np.broadcast_shapes(*(v.shape for v in inputs)))
        if len(inputs) == 1 and isinstance(inputs[0], Number) and op in _FOLDED:
            return Number(_FOLDED[op](inputs[0].value, number), shape)
        if op is Op.MULTIPLY_NUMBER and isinstance(inputs[0], Pointwise) and inputs[0].op is op:
            inner, number = inputs[0], inputs[0].number * number
            return inner.inputs[0] if number == 1 else self.pointwise(op, inner.inputs, number)
        ready = [self.broadcast(v, shape) for v in inputs]
        earliest = -1
        for value in ready:
            at = self.position_of(value)
            same = isinstance(value, Pointwise)
            earliest = max(earliest, at if same else at + 1)
        group = None
        for candidate in self.order[max(earliest, 0) :]:
            if isinstance(candidate, Group) and candidate.shape == shape and len(candidate.nodes) < 60:
                group = candidate
                break
        if group is None:
            group = Group(shape)
            self.order.append(group)
        # A value of an earlier group has to be read from the arena.
        inputs_ = tuple(self.store(v) if isinstance(v, Pointwise) and v.group is not group else v for v in ready)
        key = (op, tuple(map(id, inputs_)), number)
        for node in group.nodes:
            if (node.op, tuple(map(id, node.inputs)), node.number) == key:
                return node
        made = Pointwise(op, inputs_, number, shape, group=group)
        group.nodes.append(made)
        return made

    def broadcast(self, value: Value, shape: tuple[int, ...]) -> Value:
        if value.shape == shape:
            return value
        return self.view(value, lambda a: np.broadcast_to(a, shape), shape)

    def view(self, value: Value, view: Callable[[Any], Any], shape: tuple[int, ...]) -> Value:
        if isinstance(value, Number):
            return Number(value.value, shape)
        if isinstance(value, Constant):
            return Constant(value.node, view(value.places))
        return self.places(value).viewed(view)

    def constant(self, node: fx.Node) -> Value:
        """The value of a node without x."""
        if node in self.static:
            tensor = self.static[node]
            if not isinstance(tensor, Tensor):
                return tensor
            if tensor.is_complex():
                raise LaneError("complex numbers")
            array = tensor.detach().to(torch.float64).cpu().numpy()
            if array.size and (array == array.flat[0]).all():
                return Number(float(array.flat[0]), tuple(array.shape))
        shape = tuple(node.meta["val"].shape) if node not in self.static else tuple(self.static[node].shape)
        start = self.add_constant(node, "plain", lambda t: t.reshape(-1), math.prod(shape))
        return Constant(start, np.arange(start, start + math.prod(shape), dtype=np.int64).reshape(shape))

    def add_constant(self, node: fx.Node, kind: Any, pack: Callable[[Tensor], Tensor], size: int) -> int:
        if (node, kind) not in self.constant_starts:
            self.constant_starts[node, kind] = self.constant_size
            self.constants.append((node, pack, self.constant_size))
            self.constant_size += size
        return self.constant_starts[node, kind]

    # ---- the graph

    def run(self) -> Lowered:
        graph = self.traced.graph.graph
        position = 0
        output: Any = None
        for node in graph.nodes:
            if node.op == "placeholder":
                if position == self.traced.position:
                    shape = tuple(node.meta["val"].shape)
                    self.values[node] = self.contiguous(shape, -1)
                    self.x = self.values[node]
                else:
                    weight = self.traced.weights[position - (position > self.traced.position)]
                    if isinstance(weight, Tensor) and not weight.is_floating_point():
                        self.static[node] = weight
                    else:
                        self.lazy.add(node)
                position += 1
            elif node.op == "get_attr":
                found: Any = self.traced.graph
                for part in node.target.split("."):
                    found = getattr(found, part)
                self.static[node] = found
            elif node.op == "call_function":
                self.call(node)
            elif node.op == "output":
                output = node.args[0]
        energy, gradient = (self.value(node) for node in output)
        return self.finish(energy, gradient)

    def value(self, node: Any) -> Value:
        if not isinstance(node, fx.Node):
            return Number(float(node), ())
        if node in self.values:
            return self.values[node]
        return self.constant(node)

    def call(self, node: Any) -> None:
        inputs = node.all_input_nodes
        if not any(n in self.values for n in inputs):
            if any(n in self.lazy for n in inputs):
                self.lazy.add(node)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.static[n])
                kwargs = {k: v for k, v in kwargs.items() if k != "device"}
                made = node.target(*args, **kwargs)
                self.static[node] = torch.zeros_like(made) if "empty" in str(node.target) else made
            return
        if node.target is operator.getitem:
            self.values[node] = self.values[node.args[0]][node.args[1]]
            return
        name = node.target._schema.name.split("::")[1]
        rule = getattr(self, f"do_{name}", None)
        meta = node.meta.get("val")
        if isinstance(meta, Tensor) and (
            meta.dtype in (torch.float64, torch.float16, torch.bfloat16) or meta.is_complex()
        ):
            raise LaneError(f"{node.name} is {meta.dtype}")
        if name in _FILLED:
            shape = tuple(meta.shape)
            self.values[node] = Number(_FILLED[name](node), shape)
        elif rule is not None:
            self.values[node] = rule(node, *node.args, **node.kwargs)
        elif name in _SAME:
            self.values[node] = self.value(node.args[0])
        elif name in _UNARY:
            self.values[node] = self.pointwise(_UNARY[name], (self.value(node.args[0]),))
        elif name in _BINARY:
            self.values[node] = self.binary(node, _BINARY[name])
        elif name in _REDUCTIONS:
            self.values[node] = self.reduce(node, _REDUCTIONS[name])
        elif meta is not None and isinstance(meta, Tensor) and self.as_view(node, name):
            pass
        else:
            raise LaneError(f"{node.target} has no instruction")

    def as_view(self, node: Any, name: str) -> bool:
        """Operations that only move numbers are carried out on their addresses."""
        if name not in _VIEWS:
            return False
        shape = tuple(node.meta["val"].shape)
        value = self.value(node.args[0])

        def view(places: Any) -> Any:
            moved = node.target(torch.from_numpy(np.ascontiguousarray(places)), *node.args[1:], **node.kwargs)
            return moved.numpy()

        self.values[node] = self.view(value, view, shape)
        return True

    def binary(self, node: Any, op: Op) -> Value:
        a, b = self.value(node.args[0]), self.value(node.args[1])
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            b = self.binary_values(Op.MULTIPLY, b, Number(float(alpha), ()))
        if node.kwargs.get("rounding_mode"):
            quotient = self.binary_values(Op.DIVIDE, a, b)
            return self.pointwise(Op.FLOOR if node.kwargs["rounding_mode"] == "floor" else Op.TRUNCATE, (quotient,))
        return self.expanded(self.binary_values(op, a, b), tuple(node.meta["val"].shape))

    def expanded(self, value: Value, shape: tuple[int, ...]) -> Value:
        return value if value.shape == shape else self.view(value, lambda a: np.broadcast_to(a, shape), shape)

    def binary_values(self, op: Op, a: Value, b: Value) -> Value:
        if isinstance(a, Number) and isinstance(b, Number):
            table = {
                Op.MULTIPLY: operator.mul,
                Op.ADD: operator.add,
                Op.SUBTRACT: operator.sub,
                Op.DIVIDE: operator.truediv,
            }
            return Number(table[op](a.value, b.value), tuple(np.broadcast_shapes(a.shape, b.shape)))
        if isinstance(a, Number) and op in _SWAPPED:
            op, a, b = _SWAPPED[op], b, a
        shape = tuple(np.broadcast_shapes(a.shape, b.shape))
        if isinstance(b, Number):
            a = self.broadcast(a, shape)
            if op is Op.SUBTRACT:
                op, b = Op.ADD, Number(-b.value, b.shape)
            if op is Op.DIVIDE and b.value != 0 and math.frexp(b.value)[0] in (0.5, -0.5):
                op, b = Op.MULTIPLY, Number(1 / b.value, b.shape)
            if (op is Op.MULTIPLY and b.value == 1) or (op is Op.ADD and b.value == 0):
                return a
            if op is Op.MULTIPLY and b.value == -1:
                return self.pointwise(Op.NEGATE, (a,))
            if op is Op.POWER:
                return self.power(a, b.value)
            if op in _WITH_NUMBER:
                return self.pointwise(_WITH_NUMBER[op], (a,), b.value)
            if op is Op.DIVIDE:
                return self.pointwise(op, (a, self.number_tensor(b.value, shape)))
        if isinstance(a, Number):
            b = self.broadcast(b, shape)
            if op is Op.SUBTRACT:
                return self.pointwise(Op.NUMBER_MINUS, (b,), a.value)
            if op is Op.DIVIDE:
                return self.pointwise(Op.NUMBER_OVER, (b,), a.value)
        return self.pointwise(op, (a, b))

    def number_tensor(self, value: float, shape: tuple[int, ...]) -> Value:
        return Number(value, shape)

    def power(self, a: Value, exponent: float) -> Value:
        if exponent == 1:
            return a
        if exponent == 2:
            return self.pointwise(Op.SQUARE, (a,))
        if exponent == 0.5:
            return self.pointwise(Op.SQUARE_ROOT, (a,))
        if exponent == -0.5:
            return self.pointwise(Op.RECIPROCAL_ROOT, (a,))
        if exponent == int(exponent) and 0 < abs(exponent) <= 64:
            result, square, left = None, a, int(abs(exponent))
            while left:
                if left & 1:
                    result = square if result is None else self.pointwise(Op.MULTIPLY, (result, square))
                left >>= 1
                if left:
                    square = self.pointwise(Op.SQUARE, (square,))
            return result if exponent > 0 else self.pointwise(Op.RECIPROCAL, (result,))
        return self.pointwise(Op.POWER_NUMBER, (a,), exponent)

    def reduce(self, node: Any, reduction: Reduction) -> Value:
        value = self.value(node.args[0])
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", None)
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        ndim = len(value.shape)
        if dims is None or (isinstance(dims, list | tuple) and len(dims) == 0):
            dims = list(range(ndim))
        dims = sorted({d % ndim for d in ([dims] if isinstance(dims, int) else dims)}) if ndim else []
        out_shape = tuple(1 if d in dims else n for d, n in enumerate(value.shape))
        final = out_shape if keep else tuple(n for d, n in enumerate(value.shape) if d not in dims)
        count = math.prod(value.shape[d] for d in dims)
        if count == 1:
            return self.view(value, lambda a: a.reshape(final), final)
        if isinstance(value, Number) and reduction is Reduction.SUM:
            return Number(value.value * count, final)
        if isinstance(value, Constant | Number):
            value = self.pointwise(Op.COPY, (value,))
        if isinstance(value, Places):
            value = self.pointwise(Op.COPY, (value,))
        order = tuple(d for d in range(ndim) if d not in dims) + tuple(dims)
        # Axes of length 1 don't matter for the order.
        rows = ndim - len(dims)
        group = value.group
        if (
            group.order is not None
            and (group.order, group.rows) != (order, rows)
            and not _same_order(group, order, rows)
        ):
            stored = self.store(value)
            group = Group(value.shape)
            self.order.append(group)
            value = Pointwise(Op.COPY, (stored,), 0.0, value.shape, group=group)
            group.nodes.append(value)
        if group.order is None:
            group.order, group.rows = order, rows
        if sum(kind is not Reduction.STORE for kind, _, _ in group.outputs) >= 8:
            stored = self.store(value)
            group = Group(value.shape, order, rows)
            self.order.append(group)
            value = Pointwise(Op.COPY, (stored,), 0.0, value.shape, group=group)
            group.nodes.append(value)
        position = self.order.index(group)
        out = self.contiguous(tuple(value.shape[d] for d in order[:rows]), position)
        group.outputs.append((reduction, value, out))
        return out.viewed(lambda a: a.reshape(final))

    # ---- rules by name

    def do_copy(self, node: Any, target: Any, source: Any, *_: Any) -> Value:
        return self.broadcast(self.value(source), tuple(node.meta["val"].shape))

    def do_copy_(self, node: Any, target: fx.Node, source: Any, *_: Any) -> Value:
        """A tensor that is written over: later readers of it read the source. Nothing else may see its memory."""

        def shares(other: fx.Node) -> bool:
            name = (
                other.target._schema.name.split("::")[1]
                if other.op == "call_function" and hasattr(other.target, "_schema")
                else ""
            )
            return name in _VIEWS or name in ("alias", "detach", "contiguous")

        if target.op != "call_function" or shares(target) or any(shares(user) for user in target.users):
            raise LaneError(f"{node.name} writes into a view")
        shape = tuple(node.meta["val"].shape)
        self.values[target] = self.broadcast(self.value(source), shape)
        return self.values[target]

    def do_max_pool2d_with_indices(
        self,
        node: Any,
        x: Any,
        kernel: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Any:
        shape = tuple(node.meta["val"][0].shape)
        values = self.windows(self.value(x), shape, kernel, stride, padding, dilation)
        reduced = self.reduce_last(values, Reduction.MAXIMUM)
        return [reduced, (values, reduced)]

    def do_max_pool2d_with_indices_backward(
        self,
        node: Any,
        grad: Any,
        x: Any,
        kernel: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        ceil_mode: bool,
        indices: Any,
    ) -> Value:
        """The gradient goes to the first of the largest numbers of a window."""
        values, largest = self.values[indices]
        given, shape = self.value(grad), tuple(x.meta["val"].shape)
        count = values.shape[-1]
        taken: Value = None
        parts = []
        for k in range(count):
            here = values.viewed(lambda a, k=k: a[..., k])
            equal: Value = self.pointwise(Op.EQUAL, (here, largest))
            if taken is None:
                mine, taken = equal, equal
            else:
                mine = self.pointwise(Op.LOGICAL_AND, (equal, self.pointwise(Op.LOGICAL_NOT, (taken,))))
                taken = self.pointwise(Op.LOGICAL_OR, (taken, equal))
            parts.append(self.places(self.pointwise(Op.MULTIPLY, (given, mine))))
        source = Places(np.stack([p.buffers for p in parts], -1), np.stack([p.places for p in parts], -1))
        number = np.arange(math.prod(shape)).reshape(shape)
        index = self._window_index(shape, tuple(largest.shape), kernel, stride, padding, dilation, number, -1)
        inside = index >= 0
        flat = Places(source.buffers[inside], source.places[inside])
        return self.scatter_add(Number(0.0, shape), index[inside], flat, True)

    def _window_index(
        self,
        shape: tuple[int, ...],
        out: tuple[int, ...],
        kernel: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        array: Any,
        fill: int,
    ) -> np.ndarray[Any, Any]:
        def two(value: Any) -> tuple[int, int]:
            return (value, value) if isinstance(value, int) else (value[0], value[-1])

        k, p, d = two(kernel), two(padding), two(dilation)
        s = two(stride) if stride else k
        reach = [(o - 1) * s_ + (k_ - 1) * d_ + 1 for o, s_, k_, d_ in zip(out[2:], s, k, d, strict=True)]
        grown = [(0, 0), (0, 0)] + [(p_, max(r - n - p_, 0)) for p_, r, n in zip(p, reach, shape[2:], strict=True)]
        padded = np.pad(array, grown, constant_values=fill)
        rows = s[0] * np.arange(out[2])[:, None] + d[0] * np.arange(k[0])
        columns = s[1] * np.arange(out[3])[:, None] + d[1] * np.arange(k[1])
        found = padded[:, :, rows[:, None, :, None], columns[None, :, None, :]]
        return found.reshape(*out, k[0] * k[1])

    def windows(self, x: Value, out: tuple[int, ...], kernel: Any, stride: Any, padding: Any, dilation: Any) -> Places:
        given = self.places(x)
        low = self.places(self.pointwise(Op.COPY, (Number(-math.inf, ()),)))
        args = (given.shape, out, kernel, stride, padding, dilation)
        return Places(
            self._window_index(*args, given.buffers, int(low.buffers)),
            self._window_index(*args, given.places, int(low.places)),
        )

    def reduce_last(self, value: Places, reduction: Reduction) -> Places:
        return self.sum_last(value, reduction)

    def do_avg_pool2d(
        self,
        node: Any,
        x: Any,
        kernel: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> Value:
        shape = tuple(node.meta["val"].shape)
        value = self.value(x)
        zero = self.zeros(())
        given = self.places(value)
        args = (given.shape, shape, kernel, stride, padding, 1)
        windows = Places(
            self._window_index(*args, given.buffers, int(zero.buffers)),
            self._window_index(*args, given.places, int(zero.places)),
        )
        share = self._shares(given.shape, shape, kernel, stride, padding, ceil_mode, count_include_pad, divisor)
        return self.pointwise(Op.MULTIPLY, (self.sum_last(windows), share))

    def do_avg_pool2d_backward(
        self,
        node: Any,
        grad: Any,
        x: Any,
        kernel: Any,
        stride: Any,
        padding: Any,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor: int | None,
    ) -> Value:
        given, shape = self.value(grad), tuple(x.meta["val"].shape)
        share = self._shares(shape, given.shape, kernel, stride, padding, ceil_mode, count_include_pad, divisor)
        scaled = self.places(self.pointwise(Op.MULTIPLY, (given, share)))
        number = np.arange(math.prod(shape)).reshape(shape)
        index = self._window_index(shape, given.shape, kernel, stride, padding, 1, number, -1)
        source = scaled.viewed(lambda a: np.broadcast_to(a[..., None], index.shape))
        inside = index >= 0
        return self.scatter_add(
            Number(0.0, shape), index[inside], Places(source.buffers[inside], source.places[inside]), True
        )

    def _shares(
        self,
        shape: tuple[int, ...],
        out: tuple[int, ...],
        kernel: Any,
        stride: Any,
        padding: Any,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor: int | None,
    ) -> Value:
        """1 / how many numbers are averaged, for each window."""
        ones = torch.ones(1, 1, *shape[2:], dtype=torch.float64)
        mean = torch.nn.functional.avg_pool2d(
            ones, kernel, stride or None, padding, ceil_mode, count_include_pad, divisor
        )
        size = kernel if isinstance(kernel, int) else math.prod(kernel if len(kernel) == 2 else (kernel[0], kernel[0]))
        size = kernel * kernel if isinstance(kernel, int) else size
        total = torch.nn.functional.avg_pool2d(ones, kernel, stride or None, padding, ceil_mode, True, 1)
        share = mean / total
        if bool((share == share.flatten()[0]).all()):
            return Number(float(share.flatten()[0]), out)
        return self.literal(share.expand(out).float())

    def literal(self, tensor: Tensor) -> Constant:
        """A constant of the lowering's own."""
        node = self.traced.graph.graph.create_node("get_attr", f"_literal_{len(self.static)}")
        self.static[node] = tensor
        start = self.add_constant(node, "plain", lambda t: t.reshape(-1), tensor.numel())
        return Constant(start, np.arange(start, start + tensor.numel(), dtype=np.int64).reshape(tensor.shape))

    def do_where(self, node: Any, condition: Any, a: Any, b: Any) -> Value:
        return self.pointwise(Op.SELECT, [self.value(v) for v in (condition, a, b)])

    def do_relu(self, node: Any, x: Any) -> Value:
        return self.pointwise(Op.MAXIMUM_NUMBER, (self.value(x),), 0.0)

    def do_leaky_relu(self, node: Any, x: Any, slope: float = 0.01) -> Value:
        value = self.value(x)
        above = self.pointwise(Op.GREATER_NUMBER, (value,), 0.0)
        return self.pointwise(Op.SELECT, (above, value, self.pointwise(Op.MULTIPLY_NUMBER, (value,), slope)))

    def do_clamp(self, node: Any, x: Any, low: Any = None, high: Any = None) -> Value:
        value = self.value(x)
        if low is not None:
            value = self.pointwise(Op.MAXIMUM_NUMBER, (value,), float(low))
        if high is not None:
            value = self.pointwise(Op.MINIMUM_NUMBER, (value,), float(high))
        return value

    def do_rsub(self, node: Any, a: Any, b: Any, alpha: float = 1) -> Value:
        return self.binary_values(
            Op.SUBTRACT, self.value(b), self.binary_values(Op.MULTIPLY, self.value(a), Number(float(alpha), ()))
        )

    def do_cat(self, node: Any, tensors: Any, dim: int = 0) -> Value:
        parts = [self.places(self.value(t)) for t in tensors]
        parts = [p for p in parts if p.shape != (0,)]
        return Places(np.concatenate([p.buffers for p in parts], dim), np.concatenate([p.places for p in parts], dim))

    def do_stack(self, node: Any, tensors: Any, dim: int = 0) -> Value:
        parts = [self.places(self.value(t)) for t in tensors]
        return Places(np.stack([p.buffers for p in parts], dim), np.stack([p.places for p in parts], dim))

    def do_roll(self, node: Any, x: Any, shifts: Any, dims: Any = ()) -> Value:
        value = self.value(x)
        return self.view(value, lambda a: np.roll(a, tuple(shifts), tuple(dims) if dims else None), value.shape)

    def do_index(self, node: Any, x: Any, indices: Any) -> Value:
        given: list[Any] = []
        for index in indices:
            if index is None:
                given.append(slice(None))
            elif index in self.static:
                given.append(self.static[index].numpy())
            else:
                raise LaneError(f"{node.name}: an index that depends on the sample or on weights")
        value = self.value(x)
        shape = tuple(node.meta["val"].shape)
        return self.view(
            value,
            lambda a: torch.from_numpy(np.ascontiguousarray(a))[
                tuple(slice(None) if isinstance(g, slice) else torch.from_numpy(g) for g in given)
            ].numpy(),
            shape,
        )

    def do_gather(self, node: Any, x: Any, dim: int, index: Any, **_: Any) -> Value:
        if index not in self.static:
            raise LaneError(f"{node.name}: an index that depends on the sample or on weights")
        shape = tuple(node.meta["val"].shape)
        return self.view(
            self.value(x),
            lambda a: torch.gather(torch.from_numpy(np.ascontiguousarray(a)), dim, self.static[index]).numpy(),
            shape,
        )

    def _scattered(
        self, base: Any, put: Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], None], source: Any
    ) -> Value:
        into, given = self.places(self.value(base)), self.places(self.value(source))
        buffers, places = into.buffers.copy(), into.places.copy()
        put(buffers, given.buffers)
        put(places, given.places)
        return Places(buffers, places)

    def do_slice_scatter(
        self, node: Any, x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
    ) -> Value:
        def put(into: Any, given: Any) -> None:
            aten.slice.Tensor(torch.from_numpy(into), dim, start, end, step).copy_(
                torch.from_numpy(np.ascontiguousarray(given))
            )

        return self._scattered(x, put, source)

    def do_select_scatter(self, node: Any, x: Any, source: Any, dim: int, index: int) -> Value:
        def put(into: Any, given: Any) -> None:
            torch.from_numpy(into).select(dim, index).copy_(torch.from_numpy(np.ascontiguousarray(given)))

        return self._scattered(x, put, source)

    def do_as_strided_scatter(
        self, node: Any, x: Any, source: Any, size: Any, stride: Any, offset: int | None = None
    ) -> Value:
        if not node.args[0].meta["val"].is_contiguous():
            raise LaneError(f"{node.name} writes into a tensor that is not contiguous")

        def put(into: Any, given: Any) -> None:
            torch.from_numpy(into).as_strided(size, stride, offset or 0).copy_(
                torch.from_numpy(np.ascontiguousarray(given))
            )

        return self._scattered(x, put, source)

    def do_constant_pad_nd(self, node: Any, x: Any, pad: Any, value: float = 0) -> Value:
        inner = self.value(x)
        padding = [(0, 0)] * len(inner.shape)
        for i in range(len(pad) // 2):
            padding[-1 - i] = (pad[2 * i], pad[2 * i + 1])
        given = self.places(inner)
        if value == 0:
            filler = self.zeros(())
        else:
            filler = self.places(self.pointwise(Op.COPY, (Number(float(value), ()),)))
        cut = tuple(slice(max(-low, 0), n - max(-high, 0)) for (low, high), n in zip(padding, given.shape, strict=True))
        grown = [(max(low, 0), max(high, 0)) for low, high in padding]
        return Places(
            np.pad(given.buffers[cut], grown, constant_values=int(filler.buffers)),
            np.pad(given.places[cut], grown, constant_values=int(filler.places)),
        )

    def do_index_put(self, node: Any, x: Any, indices: Any, values: Any, accumulate: bool = False) -> Value:
        base = self.value(x)
        given: list[Any] = []
        for index in indices:
            if index is None:
                given.append(slice(None))
            elif index in self.static:
                given.append(torch.as_tensor(self.static[index]))
            else:
                raise LaneError(f"{node.name}: an index that depends on the sample or on weights")
        target = torch.arange(math.prod(base.shape)).reshape(base.shape)[tuple(given)]
        source = self.broadcast(self.value(values), tuple(target.shape))
        return self.scatter_add(base, target.reshape(-1).numpy(), source, accumulate)

    def do_scatter_add(self, node: Any, x: Any, dim: int, index: Any, source: Any) -> Value:
        if index not in self.static:
            raise LaneError(f"{node.name}: an index that depends on the sample or on weights")
        base = self.value(x)
        places = torch.arange(math.prod(base.shape)).reshape(base.shape)
        target = torch.gather(places, dim, self.static[index])
        return self.scatter_add(base, target.reshape(-1).numpy(), self.value(source), True)

    def scatter_add(self, base: Value, target: np.ndarray[Any, Any], source: Value, accumulate: bool) -> Value:
        given = self.places(source)
        flat_b, flat_p = given.buffers.reshape(-1), given.places.reshape(-1)
        counts = np.bincount(target, minlength=math.prod(base.shape))
        most = int(counts.max(initial=0))
        if not accumulate or (isinstance(base, Number) and base.value == 0 and most <= 1):
            into = self.places(base)
            buffers, places = into.buffers.reshape(-1).copy(), into.places.reshape(-1).copy()
            buffers[target], places[target] = flat_b, flat_p
            return Places(buffers.reshape(base.shape), places.reshape(base.shape))
        zero = self.zeros((math.prod(base.shape), most))
        buffers, places = zero.buffers.copy(), zero.places.copy()
        order = np.argsort(target, kind="stable")
        within = np.arange(len(target)) - np.concatenate([[0], np.cumsum(counts)])[target[order]]
        buffers[target[order], within], places[target[order], within] = flat_b[order], flat_p[order]
        added = self.sum_last(Places(buffers, places)).viewed(lambda a: a.reshape(base.shape))
        if isinstance(base, Number) and base.value == 0:
            return added
        return self.pointwise(Op.ADD, (base, added))

    def sum_last(self, value: Places, reduction: Reduction = Reduction.SUM) -> Places:
        copied = self.pointwise(Op.COPY, (value,))
        ndim = len(value.shape)
        group = copied.group
        if group.order is not None:
            group = Group(value.shape)
            self.order.append(group)
            copied = Pointwise(Op.COPY, (value,), 0.0, value.shape, group=group)
            group.nodes.append(copied)
        group.order, group.rows = tuple(range(ndim)), ndim - 1
        out = self.contiguous(value.shape[:-1], self.order.index(group))
        group.outputs.append((reduction, copied, out))
        return out

    def do_cumsum(self, node: Any, x: Any, dim: int) -> Value:
        value = self.places(self.value(x))
        moved = value.viewed(lambda a: np.moveaxis(a, dim, -1))
        length = moved.shape[-1]
        out = self.contiguous(moved.shape, len(self.order))
        self.order.append(
            ("scan", moved.viewed(lambda a: a.reshape(-1, length)), out.viewed(lambda a: a.reshape(-1, length)))
        )
        return out.viewed(lambda a: np.moveaxis(a, -1, dim))

    def do_mm(self, node: Any, a: Any, b: Any) -> Value:
        left, right = self.value(a), self.value(b)
        left_sample, right_sample = a in self.values, b in self.values
        if left_sample and right_sample:
            return self.pair(left, right, (1,)).viewed(lambda v: v[0])
        if right_sample:  # W x = (x^T W^T)^T
            return self.product(
                right.shape[1], self.view(right, lambda v: v.T, right.shape[::-1]), a, lambda t: t.T
            ).viewed(lambda v: v.T)
        return self.product(left.shape[0], left, b, lambda t: t)

    def do_bmm(self, node: Any, a: Any, b: Any) -> Value:
        left, right = self.value(a), self.value(b)
        if a in self.values and b in self.values:
            return self.pair(left, right, (left.shape[0],))
        parts = []
        for i in range(left.shape[0]):
            if a in self.values:
                rows = self.view(left, operator.itemgetter(i), left.shape[1:])
                parts.append(self.product(rows.shape[0], rows, b, operator.itemgetter(i), i))
            else:
                columns = self.view(right, functools.partial(_transposed, i), right.shape[:0:-1])
                parts.append(
                    self.product(columns.shape[0], columns, a, functools.partial(_transposed, i), i).viewed(
                        lambda v: v.T
                    )
                )
        return Places(np.stack([p.buffers for p in parts]), np.stack([p.places for p in parts]))

    def product(
        self, rows: int, left: Value, weight: fx.Node, select: Callable[[Tensor], Tensor], kind: Any = 0
    ) -> Places:
        """(R, K) times a constant (K, C)."""
        shape = tuple(self.meta_shape(weight))
        example = select(torch.empty(shape, device="meta"))
        depth, columns = example.shape
        start = self.add_constant(
            weight,
            ("matrix", kind, tuple(example.stride())),
            lambda t: pack_matrix(select(t)),
            depth * -(-columns // 16) * 16,
        )
        source = self.separable(self.places(left))
        out = self.contiguous((rows, columns), len(self.order))
        self.order.append(("product", source, start, out))
        return out

    def do_convolution(
        self,
        node: Any,
        x: Any,
        weight: Any,
        bias: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: bool,
        output_padding: Any,
        groups: int,
    ) -> Value:
        if weight in self.values:
            raise LaneError("a convolution with weights that depend on the sample")
        result = self.convolve(
            self.value(x),
            weight,
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            groups,
            tuple(node.meta["val"].shape),
        )
        if bias is None:
            return result
        numbers = self.value(bias)
        return self.pointwise(
            Op.ADD,
            (
                result,
                self.view(
                    numbers,
                    lambda a: a.reshape(1, -1, *([1] * (len(result.shape) - 2))),
                    (1, numbers.shape[0], *([1] * (len(result.shape) - 2))),
                ),
            ),
        )

    def do_convolution_backward(
        self,
        node: Any,
        grad: Any,
        x: Any,
        weight: Any,
        bias_sizes: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: bool,
        output_padding: Any,
        groups: int,
        mask: Any,
    ) -> Value:
        if mask[1] or mask[2] or weight in self.values:
            raise LaneError("the gradient of a convolution's weights")
        shape = tuple(x.meta["val"].shape)
        return [
            self.convolve(
                self.value(grad), weight, stride, padding, dilation, not transposed, None, groups, shape, adjoint=True
            ),
            None,
            None,
        ]

    def convolve(
        self,
        x: Value,
        weight: fx.Node,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: bool,
        output_padding: Any,
        groups: int,
        shape: tuple[int, ...],
        adjoint: bool = False,
    ) -> Value:
        """A convolution as one product for each group: windows of the padded image times the kernel.

        A transposed one is a convolution of the image with zeros between its pixels by the turned kernel.
        """
        kernel = self.meta_shape(weight)
        dims = len(kernel) - 2
        size = kernel[2:]
        image = self.places(x).viewed(lambda a: a[0])
        zero = self.zeros(())

        def filled(shape_: tuple[int, ...]) -> tuple[Any, Any]:
            return np.full(shape_, int(zero.buffers)), np.full(shape_, int(zero.places))

        channels = image.shape[0]
        if transposed:
            spread = tuple((n - 1) * s + 1 for n, s in zip(image.shape[1:], stride, strict=True))
            # Where the image begins among zeros, so that the result has the shape wanted.
            low = [d * (k - 1) - p for k, p, d in zip(size, padding, dilation, strict=True)]
            reach = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
            total = tuple(n + r for n, r in zip(shape[2:], reach, strict=True))
            buffers, places = filled((channels, *total))
            inner, source = [], []
            for axis in range(dims):
                positions = low[axis] + stride[axis] * np.arange(image.shape[1 + axis])
                keep = (positions >= 0) & (positions < total[axis])
                inner.append(positions[keep])
                source.append(np.nonzero(keep)[0])
            into, of = np.ix_(np.arange(channels), *inner), np.ix_(np.arange(channels), *source)
            buffers[into], places[into] = image.buffers[of], image.places[of]
            step = (1,) * dims
            del spread
        else:
            total = tuple(n + 2 * p for n, p in zip(image.shape[1:], padding, strict=True))
            buffers, places = filled((channels, *total))
            at = (slice(None), *(slice(p, p + n) for p, n in zip(padding, image.shape[1:], strict=True)))
            buffers[at], places[at] = image.buffers, image.places
            step = tuple(stride)
        padded = Places(buffers, places)
        if any(padding) or transposed or not (padded.buffers == padded.buffers.flat[0]).all():
            padded = self.store(self.pointwise(Op.COPY, (padded,)))
        out_size = shape[2:]
        pixels = np.ix_(*(s * np.arange(n) for s, n in zip(step, out_size, strict=True)))
        window = np.ix_(*(d * np.arange(k) for d, k in zip(dilation, size, strict=True)))
        ours = channels // groups
        outputs = shape[1] // groups
        parts = []
        # A transposed convolution's weight is (in, out / groups, ...), a plain one's (out, in / groups, ...).
        for g in range(groups):

            def select(t: Tensor, g: int = g) -> Tensor:
                if transposed:
                    part = t[g * ours : (g + 1) * ours].flip(list(range(2, 2 + dims)))
                    return part.transpose(0, 1).reshape(outputs, -1).T
                return t[g * outputs : (g + 1) * outputs].reshape(outputs, -1).T

            strides = np.array([math.prod(total[i + 1 :]) for i in range(dims)])
            row = sum(p * s for p, s in zip(pixels, strides, strict=True)).reshape(-1)
            of_window = sum(w * s for w, s in zip(window, strides, strict=True)).reshape(-1)
            channel = (g * ours + np.arange(ours)) * math.prod(total)
            index = row[:, None] + (channel[:, None] + of_window[None]).reshape(-1)[None]
            rows = Places(padded.buffers.reshape(-1)[index], padded.places.reshape(-1)[index])
            parts.append(self.product(len(row), rows, weight, select, ("convolution", g, transposed)))
        joined = Places(np.concatenate([p.buffers for p in parts], 1), np.concatenate([p.places for p in parts], 1))
        return joined.viewed(lambda a: a.T.reshape(shape))

    def meta_shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.static[node].shape if node in self.static else node.meta["val"].shape)

    def separable(self, value: Places) -> Places:
        """(R, K) places that are sums of one of the row and one of the column, in one buffer; copied where not."""
        places, one = value.places, (value.buffers == value.buffers.flat[0]).all()
        if one and (places - places[:, :1] - places[:1, :] + places[0, 0] == 0).all():
            return value
        copied = self.pointwise(Op.COPY, (value,))
        return self.store(copied)

    def pair(self, left: Value, right: Value, batch: tuple[int, ...]) -> Places:
        """(B, I, K) times (B, K, J)."""
        a, b = self.places(left), self.places(right)
        if len(a.shape) == 2:
            a, b = a.viewed(lambda v: v[None]), b.viewed(lambda v: v[None])
        count, rows, depth = a.shape
        columns = b.shape[2]
        flat = self.separable(a.viewed(lambda v: v.reshape(-1, depth)))
        other = self.separable(b.viewed(lambda v: v.transpose(0, 2, 1).reshape(-1, depth)))
        out = self.contiguous((count, rows, columns), len(self.order))
        self.order.append(("pair", flat, other, out))
        return out

    # ---- addresses

    def finish(self, energy: Value, gradient: Value) -> Lowered:
        energy = self.places(energy)
        gradient = self.places(gradient)
        flat = gradient.places.reshape(-1)
        contiguous = (gradient.buffers == gradient.buffers.flat[0]).all() and np.array_equal(
            flat, np.arange(flat[0], flat[0] + len(flat))
        )
        if not contiguous or gradient.buffers.flat[0] == self.x.buffers.flat[0]:
            gradient = self.store(self.pointwise(Op.COPY, (gradient,)))
        self.plan(energy, gradient)
        instructions = [made for item in self.order for made in self.emit(item)]
        program = LaneProgram(
            sample=math.prod(self.x.shape),
            arena=self.arena,
            energy=int(self.address(energy).reshape(-1)[0]),
            gradient=int(self.address(gradient).reshape(-1)[0]),
            instructions=tuple(instructions),
            constants=self.constant_size + len(self.numbers),
        )
        return Lowered(
            program,
            [(start, pack) for _, pack, start in self.constants],
            self.evaluator(),
            self.constant_size,
            self.traced.weights,
            list(self.numbers),
        )

    def evaluator(self) -> fx.GraphModule:
        """A module from the weights to the constants' tensors."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        statics: dict[str, Tensor] = {}
        position = 0
        for node in self.traced.graph.graph.nodes:
            if node.op == "placeholder":
                if position != self.traced.position:
                    copies[node] = graph.placeholder(node.name)
                position += 1
            elif node in self.static and isinstance(self.static[node], Tensor):
                statics[node.name] = self.static[node]
            elif node in self.lazy:
                for used in node.all_input_nodes:
                    if used not in copies:
                        copies[used] = graph.get_attr(f"static_{used.name}")
                copies[node] = graph.node_copy(node, copies.__getitem__)
        holder = torch.nn.Module()
        for name, tensor in statics.items():
            setattr(holder, f"static_{name}", tensor)
        wanted = []
        for node, _, _ in self.constants:
            if node not in copies:
                copies[node] = graph.get_attr(f"static_{node.name}")
            wanted.append(copies[node])
        graph.output(tuple(wanted))
        graph.eliminate_dead_code()
        return fx.GraphModule(holder, graph)

    def plan(self, energy: Places, gradient: Places) -> None:
        """A place in the arena for every buffer, free from the instruction that writes it to the last reader."""

        def used(value: Any, at: int) -> None:
            if isinstance(value, Places):
                for b in np.unique(value.buffers):
                    self.buffers[b].first = min(self.buffers[b].first, at)
                    self.buffers[b].last = max(self.buffers[b].last, at)

        for at, item in enumerate(self.order):
            if isinstance(item, Group):
                for node in item.nodes:
                    for value in node.inputs:
                        used(value, at)
                for _, _, out in item.outputs:
                    used(out, at)
            elif item[0] == "zero":
                self.buffers[item[1]].first, self.buffers[item[1]].last = 0, len(self.order)
            else:
                for value in item:
                    used(value, at)
        end = len(self.order)
        used(energy, end)
        used(gradient, end)
        x = int(self.x.buffers.flat[0])
        self.buffers[x].first, self.buffers[x].last, self.buffers[x].start = -1, end + 1, 0
        size = self.buffers[x].size
        taken: list[tuple[int, int, Buffer]] = [(0, size, self.buffers[x])]
        self.arena = size
        for buffer in sorted((b for b in self.buffers if b.start < 0 and b.last >= 0), key=lambda b: b.first):
            busy = sorted(
                (s, e) for s, e, other in taken if not (other.last < buffer.first or buffer.last < other.first)
            )
            start = 0
            for s, e in busy:
                if s - start >= buffer.size:
                    break
                start = max(start, e)
            buffer.start = start
            taken.append((start, start + buffer.size, buffer))
            self.arena = max(self.arena, start + buffer.size)
        self.numbers: dict[float, int] = {}

    def address(self, value: Places) -> np.ndarray[Any, Any]:
        starts = np.array([b.start for b in self.buffers], np.int64)
        return starts[value.buffers] + value.places

    def emit(self, item: Any) -> list[Instruction]:
        if isinstance(item, Group):
            return self.emit_map(item)
        if item[0] == "zero":
            place = np.array([self.buffers[item[1]].start])
            operand = Operand(Space.NUMBER, np.array([self.number(0.0)]))
            return [Map(1, 1, (operand,), (Micro(Op.COPY, 1, 0),), (Output(Reduction.STORE, 1, place),))]
        if item[0] == "scan":
            return [Scan(self.address(item[1]), self.address(item[2]))]
        if item[0] == "product":
            _, source, start, out = item
            a, o = self.address(source), self.address(out)
            return [Product(a[:, 0], a[0] - a[0, 0], o[:, 0], o[0] - o[0, 0], start)]
        _, left, right, out = item
        a, b = self.address(left), self.address(right)
        count, rows, columns = out.shape
        return [
            PairProduct(
                a[:, 0].reshape(count, rows),
                a[0] - a[0, 0],
                b[:, 0].reshape(count, columns),
                b[0] - b[0, 0],
                self.address(out),
            )
        ]

    def number(self, value: float) -> int:
        return self.numbers.setdefault(value, self.constant_size + len(self.numbers))

    def emit_map(self, group: Group) -> list[Instruction]:
        shape = group.shape
        order = group.order or tuple(range(len(shape)))
        rows = group.rows if group.order is not None else len(shape)
        outer = math.prod(shape[d] for d in order[:rows])
        inner = math.prod(shape[d] for d in order[rows:])

        def arranged(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return array.transpose(order).reshape(-1)

        wanted = {id(value) for _, value, _ in group.outputs}
        needed: list[Pointwise] = []
        alive = set(wanted)
        for node in reversed(group.nodes):
            if id(node) in alive:
                needed.append(node)
                alive |= {id(v) for v in node.inputs if isinstance(v, Pointwise)}
        needed.reverse()
        if not needed:
            return []
        operands: list[Operand] = []
        index: dict[Any, int] = {}
        inputs: dict[int, int] = {}
        key: tuple[str, Any]
        for node in needed:
            for value in node.inputs:
                if isinstance(value, Pointwise) or id(value) in inputs:
                    continue
                if isinstance(value, Number):
                    key, operand = ("n", value.value), Operand(Space.NUMBER, np.array([self.number(value.value)]))
                elif isinstance(value, Constant):
                    flat = arranged(value.places)
                    key, operand = ("c", flat.tobytes()), Operand(Space.CONSTANT, flat)
                    if (flat == flat[0]).all():
                        operand = Operand(Space.NUMBER, flat[:1])
                else:
                    flat = arranged(self.address(value))
                    key, operand = ("a", flat.tobytes()), Operand(Space.ARENA, flat)
                if key not in index:
                    index[key] = len(operands)
                    operands.append(operand)
                inputs[id(value)] = index[key]
        last: dict[int, int] = {}
        for at, node in enumerate(needed):
            for value in node.inputs:
                last[id(value)] = at
        for _, value, _ in group.outputs:
            last[id(value)] = len(needed)
        registers: dict[int, int] = {}
        free: list[int] = []
        count = len(operands)
        micros = []
        for at, node in enumerate(needed):
            read = [registers[id(v)] if isinstance(v, Pointwise) else inputs[id(v)] for v in node.inputs]
            for v in {id(v): v for v in node.inputs}.values():
                if isinstance(v, Pointwise) and last[id(v)] == at:
                    free.append(registers[id(v)])
            if free:
                target = free.pop()
            else:
                target, count = count, count + 1
            registers[id(node)] = target
            if id(node) not in last:
                free.append(target)
            a, b, c = (*read, 0, 0)[:3]
            micros.append(Micro(node.op, target, a, b, c, node.number))
        if count > 64:
            raise LaneError(f"a loop needs {count} registers")
        outputs = []
        for reduction, value, out in group.outputs:
            if reduction is Reduction.STORE:
                outputs.append(Output(reduction, registers[id(value)], arranged(self.address(out))))
            else:
                outputs.append(Output(reduction, registers[id(value)], self.address(out).reshape(-1)))
        return [Map(outer, inner, tuple(operands), tuple(micros), tuple(outputs))]


def _transposed(index: int, value: Any) -> Any:
    return value[index].T


def _same_order(group: Group, order: tuple[int, ...], rows: int) -> bool:
    def real(axes: Sequence[int]) -> list[int]:
        return [d for d in axes if group.shape[d] != 1]

    assert group.order is not None
    return real(group.order[: group.rows]) == real(order[:rows]) and real(group.order[group.rows :]) == real(
        order[rows:]
    )


_FILLED = {
    "full_like": lambda node: float(node.args[1]),
    "zeros_like": lambda node: 0.0,
    "ones_like": lambda node: 1.0,
    "new_zeros": lambda node: 0.0,
    "new_ones": lambda node: 1.0,
    "new_full": lambda node: float(node.args[2]),
    "empty_like": lambda node: 0.0,
    "new_empty": lambda node: 0.0,
    "new_empty_strided": lambda node: 0.0,
}

_FOLDED = {
    Op.NEGATE: lambda x, _: -x,
    Op.SQUARE: lambda x, _: x * x,
    Op.MULTIPLY_NUMBER: lambda x, n: x * n,
    Op.ADD_NUMBER: lambda x, n: x + n,
    Op.NUMBER_MINUS: lambda x, n: n - x,
    Op.RECIPROCAL: lambda x, _: 1 / x if x else math.copysign(math.inf, x),
}

_VIEWS = {
    "view",
    "reshape",
    "_unsafe_view",
    "permute",
    "transpose",
    "t",
    "expand",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "flip",
    "diagonal",
    "unfold",
    "movedim",
    "narrow",
    "repeat",
    "as_strided",
}


def lower(traced: JointGraph) -> Lowered:
    """The lane program of a traced energy. Raises LaneError where an operation has no instruction."""
    return Lowering(traced).run()
