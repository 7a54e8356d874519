"""Scales and shifts fold into weights: blends, 1/sqrt(2), the 1/1.1 of a scaled swish, signs, batch norms in eval mode.

    s * conv(h) + t = conv'(h),  weight' = s * weight,  bias' = s * bias + t    (s, t: a number for each output channel)
    conv(c * h) = conv'(h),      weight' = c * weight                           (c: one number)

Operations that commute with a scale may lie between the scale and the weight that absorbs it: views, pools, upsampling,
sums, and in the backward part the derivative of an activation. Nested sums become one sum.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastebm.compiler import operations as op
from fastebm.compiler.lazy_tensors import Coefficient, Shape, lazy, product, scale
from fastebm.compiler.operations import Affine, Convolution, Linear, LinearCombination, Operation
from fastebm.compiler.program import Node, Program, Rewriter, replace_nodes

# f(c * h) = c * f(h), with respect to the first input if there are two.
_COMMUTING = (
    *(op.ActivationDerivative, op.AveragePool, op.AveragePoolBackward, op.Broadcast, op.Interleave),
    *(op.Permute, op.Reshape, op.Slice, op.Sum, op.Upsample),
)


def fold_scales(program: Program) -> Iterator[Program]:
    """Programs in which one scale, shift or sum is part of another operation."""
    for node in program:
        if isinstance(node.operation, LinearCombination):
            yield from _into_producers(program, node, node.operation)
            yield from _nested(program, node, node.operation)
            if len(node.inputs) == 1:
                yield from _into_users(program, node, node.operation.coefficients[0])
        elif isinstance(node.operation, Affine):
            yield from _affine_into_producer(program, node, node.operation)


# ---- into the operation that produces the input


def _into_producers(program: Program, node: Node, combine: LinearCombination) -> Iterator[Program]:
    for i, (name, c) in enumerate(zip(node.inputs, combine.coefficients, strict=True)):
        source = None if c == 1 else _producer(program, name)
        if source is not None and isinstance(source.operation, Convolution | Linear):
            operation = _with_scaled_result(source.operation, c)
            coefficients = tuple(1.0 if j == i else other for j, other in enumerate(combine.coefficients))
            sum_node = replace(node, operation=LinearCombination(coefficients))
            yield replace_nodes(program, {source.name: replace(source, operation=operation), node.name: sum_node})


def _producer(program: Program, name: str) -> Node | None:
    """The linear map that produces `name`, through commuting operations, if nothing else reads a result on the way."""
    while program.only_user(name) is not None:
        node = program[name]
        if isinstance(node.operation, Convolution | Linear):
            return node
        if not isinstance(node.operation, _COMMUTING):
            return None
        name = node.inputs[0]
    return None


def _with_scaled_result(operation: Convolution | Linear, c: Coefficient) -> Operation:
    bias = None if operation.bias is None else scale(operation.bias, c)
    return replace(operation, weight=scale(operation.weight, c), bias=bias)


def _affine_into_producer(program: Program, node: Node, affine: Affine) -> Iterator[Program]:
    source = program[node.inputs[0]]
    operation = source.operation
    if program.only_user(source.name) is not node or not isinstance(operation, Convolution | Linear):
        return
    images = isinstance(operation, Convolution)
    channels = source.shape[0 if images else -1]
    by_channel = (channels, 1, 1) if images else (channels,)
    if not all(_is_per_channel(weight.shape, by_channel) for weight in affine.weights()):
        return
    axis = 0
    if isinstance(operation, Convolution) and operation.transposed:
        if operation.groups != 1:
            return
        axis = 1
    weight = operation.weight
    if affine.scale is not None:
        weight = lazy(_scale_channels, weight, affine.scale, axis)
    bias = None
    if operation.bias is not None or affine.shift is not None:
        bias = lazy(_affine_bias, operation.bias, affine.scale, affine.shift, channels)
    yield Rewriter(program, node).finish(replace(operation, weight=weight, bias=bias), *source.inputs)


def _is_per_channel(shape: Shape, by_channel: Shape) -> bool:
    """Whether a tensor has one number, or one number for each channel."""
    return math.prod(shape) == 1 or (shape[-len(by_channel) :] == by_channel and math.prod(shape) == by_channel[0])


def _scale_channels(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * scale.reshape(shape)


def _affine_bias(bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, channels: int) -> Tensor:
    """scale * bias + shift, where bias or shift may be None, but not both."""
    terms = []
    if bias is not None:
        terms.append(bias if scale is None else bias * scale.reshape(-1))
    if shift is not None:
        terms.append(shift.reshape(-1).expand(channels))
    return torch.stack(terms).sum(0)


# ---- into the operations that read the result


def _into_users(program: Program, node: Node, c: Coefficient) -> Iterator[Program]:
    """The program without the scale `node`, if all of its users can absorb it."""
    changes: dict[str, Node] = {}
    if _absorb(program, node.name, c, changes):
        changes[node.name] = replace(node, operation=LinearCombination((1.0,)))
        yield replace_nodes(program, changes)


def _absorb(program: Program, name: str, c: Coefficient, changes: dict[str, Node]) -> bool:
    """Whether every user of `name` can absorb the scale c; `changes` gets the nodes that do."""
    if name in program.outputs:
        return False
    for user in program.users(name):
        operation = changes.get(user.name, user).operation
        first_only = user.inputs[0] == name and user.inputs.count(name) == 1
        if isinstance(operation, Convolution | Linear):
            changed: Operation = replace(operation, weight=scale(operation.weight, c))
        elif isinstance(operation, LinearCombination):
            coefficients = zip(user.inputs, operation.coefficients, strict=True)
            changed = LinearCombination(tuple(product(c, k) if other == name else k for other, k in coefficients))
        elif isinstance(operation, Affine) and operation.scale is not None:
            changed = replace(operation, scale=scale(operation.scale, c))
        elif isinstance(operation, _COMMUTING) and first_only and _absorb(program, user.name, c, changes):
            continue
        else:
            return False
        changes[user.name] = replace(user, operation=changed)
    return True


# ---- nested sums


def _nested(program: Program, node: Node, combine: LinearCombination) -> Iterator[Program]:
    for i, name in enumerate(node.inputs):
        inner = program[name].operation
        if isinstance(inner, LinearCombination) and program.only_user(name) is node:
            c = combine.coefficients[i]
            terms = tuple(product(c, k) for k in inner.coefficients)
            coefficients = (*combine.coefficients[:i], *terms, *combine.coefficients[i + 1 :])
            inputs = (*node.inputs[:i], *program[name].inputs, *node.inputs[i + 1 :])
            yield Rewriter(program, node).finish(LinearCombination(coefficients), *inputs)
