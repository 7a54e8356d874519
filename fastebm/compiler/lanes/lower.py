"""Lowers the graph of one sample to a lane program: views become addresses, pointwise operations share loops."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fastebm.ops.lanes import LaneProgram

from .emission import Emission
from .lowering import Lowering
from .planning import plan
from .recording import Depends, LaneError, storage_id
from .rules import COMPLEX_RULES, RULES
from .rules.pointwise import converted
from .trace import JointGraph
from .values import Complex, Packed, Value

__all__ = ["LaneError", "Lowered", "lower"]

aten = torch.ops.aten

_REFUSED = (torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Evaluator:
    """The constants of a program from the weights: `evaluator(*weights)`.

    Raises LaneError where something has changed that the program was made for: a number that the energy took from a
    weight, as by `item()`, or a tensor of integers or truths, such as an index.

    Attributes:
        graph: from the weights to the constants and the numbers.
        assumed: what the numbers were.
        integers: what the weights of integers were, by their place among the weights.
    """

    graph: fx.GraphModule
    assumed: tuple[Any, ...]
    integers: dict[int, Tensor]

    def __call__(self, *weights: Tensor) -> list[Tensor]:
        for i, before in self.integers.items():
            if not torch.equal(weights[i], before):
                raise LaneError("the energy reads a tensor of integers or truths that has changed")
        constants, numbers = self.graph(*weights)
        for number, before in zip(numbers, self.assumed, strict=True):
            if number != before and not (number != number and before != before):
                raise LaneError(f"the energy takes a Python number from a weight, which was {before} and is {number}")
        return constants


@dataclass(frozen=True)
class Lowered:
    """A lane program, and the tensors that its constants are packed from.

    Attributes:
        program: the program.
        constants: for each constant tensor its place, and how it is packed.
        evaluate: gives the constant tensors for weights.
        size: numbers of the constants before the scalars.
        weights: how each weight is found: a path in the module, or the tensor itself.
        numbers: the scalars that the program reads, behind the other constants.
    """

    program: LaneProgram
    constants: list[tuple[int, Callable[[Tensor], Tensor]]]
    evaluate: Evaluator
    size: int
    weights: list[str | Tensor]
    numbers: list[float]


def lower(traced: JointGraph) -> Lowered:
    """The lane program of a traced energy. Raises LaneError where an operation has no instruction."""
    lowering = Lowering(traced)
    (sample, *conditions), energy, gradient = _values(lowering)
    sample_places, gradient_places = lowering.places(sample), lowering.places(gradient)
    flat = gradient_places.codes.reshape(-1)
    own = gradient_places.buffers.isdisjoint(sample_places.buffers)
    if not own or len(gradient_places.buffers) > 1 or not np.array_equal(flat, np.arange(flat[0], flat[0] + len(flat))):
        gradient_places = lowering.stored(gradient_places)
    energy_places = lowering.places(energy)
    items = [*lowering.fillers(), *lowering.items]
    planned = plan(items, lowering.buffers, (sample_places, *conditions), (energy_places, gradient_places))
    emission = Emission(planned, lowering.constant_size)
    program = LaneProgram(
        sample=math.prod(sample.shape),
        arena=planned.arena,
        energy=int(planned.address(energy_places).reshape(-1)[0]),
        gradient=int(planned.address(gradient_places).reshape(-1)[0]),
        instructions=tuple(emission.instructions),
        constants=lowering.constant_size + len(emission.numbers),
        conditions=sum(math.prod(condition.shape) for condition in conditions),
    )
    return Lowered(
        program,
        [(packed.start, packed.pack) for packed in lowering.packed],
        _evaluator(lowering, lowering.packed),
        lowering.constant_size,
        list(traced.weights.values()),
        emission.numbers,
    )


def _values(lowering: Lowering) -> tuple[list[Value], Value, Value]:
    """The values of the sample with its conditions, the energy and the gradient."""
    traced = lowering.traced
    given: list[Value] = []
    result: Any = None
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            given.append(lowering.new_places(lowering.shape(node), -1))
            lowering.values[node] = given[-1]
        elif node.op == "get_attr":
            tensor = traced.tensors[node.target]
            changes = node.target in traced.weights and (tensor.is_floating_point() or tensor.is_complex())
            if changes:
                lowering.lazy.add(node)
            else:
                lowering.static[node] = tensor
        elif node.op == "call_function":
            _call(lowering, node)
        elif node.op == "output":
            result = node.args[0]
    energy, gradient = (lowering.value(node) for node in result)
    return given, lowering.reshaped(energy, ()), gradient


def _call(lowering: Lowering, node: fx.Node) -> None:
    inputs = node.all_input_nodes
    tensor = node.meta.get("val")
    written = lowering.traced.written
    stored = None
    if written and isinstance(tensor, Tensor):
        stored = written.get(storage_id(tensor))
    if stored is Depends.SAMPLE and isinstance(tensor, Tensor):
        _in_memory(lowering, node, tensor)
    elif any(used in lowering.values for used in inputs):
        lowering.values[node] = _lowered(lowering, node)
    elif stored is Depends.WEIGHTS or any(used in lowering.lazy for used in inputs):
        lowering.lazy.add(node)
    else:
        lowering.static[node] = _evaluated(lowering, node)


def _in_memory(lowering: Lowering, node: Any, tensor: Tensor) -> None:
    """A node whose tensor lies where the energy writes."""
    if node.target is aten.copy_.default:
        target, source = node.args
        value = lowering.value(source)
        if not isinstance(value, Complex):
            value = converted(lowering, value, lowering.dtype(source), lowering.dtype(target))
        lowering.write(tensor, value)
    elif not _is_view(node):
        if any(used in lowering.values for used in node.all_input_nodes):
            value = _lowered(lowering, node)
        else:
            if any(used in lowering.lazy for used in node.all_input_nodes):
                lowering.lazy.add(node)
            else:
                lowering.static[node] = _evaluated(lowering, node)
            value = lowering.value(node)
        lowering.write(tensor, value)
    lowering.values[node] = tensor


def _is_view(node: Any) -> bool:
    """Whether the node's tensor is another node's, seen otherwise."""
    if node.target is operator.getitem:
        return _is_view(node.args[0])
    return any(argument.alias_info is not None for argument in node.target._schema.arguments)


def _evaluated(lowering: Lowering, node: Any) -> Any:
    """What an operation gives that depends on nothing."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: lowering.static[used])
    made = node.target(*args, **kwargs)
    empty = isinstance(node.target, torch._ops.OpOverload) and "empty" in node.target._schema.name
    return torch.zeros_like(made) if empty else made


def _lowered(lowering: Lowering, node: Any) -> Value:
    if node.target is operator.getitem:
        return lowering.values[node.args[0]][node.args[1]]
    if not isinstance(node.target, torch._ops.OpOverload):
        raise LaneError(f"{node.target} has no instruction")
    name = node.target._schema.name.removeprefix("aten::")
    meta = node.meta.get("val")
    dtype = meta.dtype if isinstance(meta, Tensor) else None
    if dtype in _REFUSED:
        raise LaneError(f"{name} gives {dtype}, and lane programs compute in float32")
    is_complex = dtype is not None and dtype.is_complex
    of_complex = any(dtype.is_complex for dtype in map(lowering.dtype, node.all_input_nodes) if dtype is not None)
    rule = (COMPLEX_RULES if is_complex or of_complex else RULES).get(name)
    if rule is None:
        raise LaneError(f"{name}{' of complex numbers' if is_complex or of_complex else ''} has no instruction")
    value = rule(lowering, node, *node.args, **node.kwargs)
    if isinstance(value, list) or not isinstance(meta, Tensor):
        return value
    shape = tuple(meta.shape)
    if value.shape == shape:
        return value
    if isinstance(value, Complex):
        return Complex(lowering.broadcast(value.real, shape), lowering.broadcast(value.imag, shape))
    return lowering.broadcast(value, shape)


def _evaluator(lowering: Lowering, packed: list[Packed]) -> Evaluator:
    graph = fx.Graph()
    holder = torch.nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    given = {name: graph.placeholder(f"weight_{i}") for i, name in enumerate(lowering.traced.weights)}

    def attribute(tensor: Any) -> fx.Node:
        name = f"static_{len(vars(holder)['_buffers'])}"
        holder.register_buffer(name, tensor)
        return graph.get_attr(name)

    def copied(node: fx.Node) -> Any:
        if node not in copies:
            found = lowering.static[node]
            if not isinstance(found, Tensor):
                return found
            copies[node] = attribute(found)
        return copies[node]

    for node in lowering.traced.graph.nodes:
        if node not in lowering.lazy:
            continue
        if node.op == "get_attr":
            copies[node] = given[node.target]
        else:
            copies[node] = graph.node_copy(node, copied)

    def evaluated(source: fx.Node | Tensor) -> Any:
        if isinstance(source, Tensor):
            return attribute(source)
        made = copied(source)
        if isinstance(source.meta["val"], Tensor) and source.meta["val"].is_complex():
            made = graph.call_function(torch.view_as_real, (graph.call_function(torch.resolve_conj, (made,)),))
        elif not isinstance(source.meta["val"], Tensor):
            made = graph.call_function(torch.as_tensor, (made,))
        return made

    assumed = {node: value for node, value in lowering.traced.assumed.items() if node in lowering.lazy}
    graph.output(([evaluated(p.source) for p in packed], [copies[node] for node in assumed]))
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.meta.clear()  # tensors of the trace
    tensors = [lowering.traced.tensors[name] for name in lowering.traced.weights]
    integers = {i: t.clone() for i, t in enumerate(tensors) if not t.is_floating_point() and not t.is_complex()}
    return Evaluator(fx.GraphModule(holder, graph), tuple(assumed.values()), integers)
