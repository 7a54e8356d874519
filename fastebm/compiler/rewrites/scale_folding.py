"""Factors and shifts fold into weights, so that they cost nothing a step: blends, 1/sqrt(2), 1/1.1 of the scaled swish,
signs, eval-mode batch norms.

    s * conv(h) + t = conv'(h),  weight' = s * weight,  bias' = s * bias + t    (s, t: a number for each output channel)
    conv(c * h) = conv'(h),      weight' = c * weight                           (c: one number)

Between a factor and the weight that takes it may lie what commutes with factors: views, pools, enlargements, sums, and
in the backward part the slope of an activation. A sum of sums is one sum.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastebm.compiler.lazy_tensors import Coefficient, Shape, lazy, product, scaled
from fastebm.compiler.operations import (
    ActivationDerivative,
    Affine,
    AveragePool,
    AveragePoolBackward,
    Broadcast,
    Convolution,
    Interleave,
    Linear,
    LinearCombination,
    Operation,
    Permute,
    Reshape,
    Slice,
    Sum,
    Upsample,
)
from fastebm.compiler.program import Node, Program, Rewriter, replace_nodes

# f(c * h) = c * f(h), for the first input where there are two.
_COMMUTING = (
    AveragePool,
    AveragePoolBackward,
    Broadcast,
    Interleave,
    Permute,
    Reshape,
    Slice,
    ActivationDerivative,
    Sum,
    Upsample,
)


def fold_scales(program: Program) -> Iterator[Program]:
    """Programs with one factor, shift or sum less."""
    for node in program:
        if isinstance(node.operation, LinearCombination):
            yield from _into_producers(program, node, node.operation)
            yield from _nested(program, node, node.operation)
            if len(node.inputs) == 1:
                yield from _into_readers(program, node, node.operation.coefficients[0])
        elif isinstance(node.operation, Affine):
            yield from _affine_into_producer(program, node, node.operation)


# ---- backwards, into what made the input


def _into_producers(program: Program, node: Node, combine: LinearCombination) -> Iterator[Program]:
    for i, (name, c) in enumerate(zip(node.inputs, combine.coefficients, strict=True)):
        source = None if c == 1 else _producer(program, name)
        if source is not None:
            operation = _scaled_result(source.operation, c)
            coefficients = tuple(1.0 if j == i else other for j, other in enumerate(combine.coefficients))
            changes = {
                source.name: replace(source, operation=operation),
                node.name: replace(node, operation=LinearCombination(coefficients)),
            }
            yield replace_nodes(program, changes)


def _producer(program: Program, name: str) -> Node | None:
    """The convolution or linear map of which `name` is the result, which nothing else reads, not even on the way."""
    while program.only_user(name) is not None:
        node = program[name]
        if isinstance(node.operation, Convolution | Linear):
            return node
        if not isinstance(node.operation, _COMMUTING):
            return None
        name = node.inputs[0]
    return None


def _scaled_result(operation: Operation, c: Coefficient) -> Operation:
    """The linear map times c."""
    if not isinstance(operation, Convolution | Linear):
        raise TypeError(f"{type(operation).__name__} has no weight")
    bias = None if operation.bias is None else scaled(operation.bias, c)
    return replace(operation, weight=scaled(operation.weight, c), bias=bias)


def _affine_into_producer(program: Program, node: Node, affine: Affine) -> Iterator[Program]:
    source = program[node.inputs[0]]
    operation = source.operation
    if program.only_user(source.name) is not node or not isinstance(operation, Convolution | Linear):
        return
    images = isinstance(operation, Convolution)
    channels = source.shape[0 if images else -1]
    by_channel = (channels, 1, 1) if images else (channels,)
    if not all(_spreads(value.shape, by_channel) for value in affine.weights()):
        return
    axis = 0
    if isinstance(operation, Convolution) and operation.transposed:
        if operation.groups != 1:
            return
        axis = 1
    weight = operation.weight
    if affine.scale is not None:
        weight = lazy(_times_channels, weight, affine.scale, axis)
    bias = None
    if operation.bias is not None or affine.shift is not None:
        bias = lazy(_affine_bias, operation.bias, affine.scale, affine.shift, channels)
    yield Rewriter(program, node).finish(replace(operation, weight=weight, bias=bias), *source.inputs)


def _spreads(shape: Shape, by_channel: Shape) -> bool:
    """Whether a tensor has one number, or one for each channel."""
    return math.prod(shape) == 1 or (shape[-len(by_channel) :] == by_channel and math.prod(shape) == by_channel[0])


def _times_channels(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * scale.reshape(shape)


def _affine_bias(bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, channels: int) -> Tensor:
    """scale * bias + shift, of which bias or shift is there."""
    terms = []
    if bias is not None:
        terms.append(bias if scale is None else bias * scale.reshape(-1))
    if shift is not None:
        terms.append(shift.reshape(-1).expand(channels))
    return torch.stack(terms).sum(0)


# ---- forwards, into what reads the result


def _into_readers(program: Program, node: Node, c: Coefficient) -> Iterator[Program]:
    """The factor `node` leaves, if all that reads it can take it over."""
    changes: dict[str, Node] = {}
    if _absorbed(program, node.name, c, changes):
        changes[node.name] = replace(node, operation=LinearCombination((1.0,)))
        yield replace_nodes(program, changes)


def _absorbed(program: Program, name: str, c: Coefficient, changes: dict[str, Node]) -> bool:
    """Whether every reader of `name` can multiply by c itself, with the nodes that then do in `changes`."""
    if name in program.outputs:
        return False
    for reader in program.users(name):
        operation = changes.get(reader.name, reader).operation
        first_only = reader.inputs[0] == name and reader.inputs.count(name) == 1
        if isinstance(operation, Convolution | Linear):
            changed: Operation = replace(operation, weight=scaled(operation.weight, c))
        elif isinstance(operation, LinearCombination):
            coefficients = zip(reader.inputs, operation.coefficients, strict=True)
            changed = LinearCombination(tuple(product(c, k) if other == name else k for other, k in coefficients))
        elif isinstance(operation, Affine) and operation.scale is not None:
            changed = replace(operation, scale=scaled(operation.scale, c))
        elif isinstance(operation, _COMMUTING) and first_only and _absorbed(program, reader.name, c, changes):
            continue
        else:
            return False
        changes[reader.name] = replace(reader, operation=changed)
    return True


# ---- sums of sums


def _nested(program: Program, node: Node, combine: LinearCombination) -> Iterator[Program]:
    for i, name in enumerate(node.inputs):
        inner = program[name].operation
        if isinstance(inner, LinearCombination) and program.only_user(name) is node:
            c = combine.coefficients[i]
            terms = tuple(product(c, k) for k in inner.coefficients)
            coefficients = (*combine.coefficients[:i], *terms, *combine.coefficients[i + 1 :])
            inputs = (*node.inputs[:i], *program[name].inputs, *node.inputs[i + 1 :])
            yield Rewriter(program, node).finish(LinearCombination(coefficients), *inputs)
