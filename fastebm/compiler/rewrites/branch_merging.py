"""Convolutions of one input whose results are added are one convolution with the sum of the kernels.

    a * conv1(h) + b * conv2(h) = conv'(h),  weight' = a * weight1 + b * weight2

A smaller kernel is one with zeros around it, if its padding is smaller by as much. So in a growing net the blend of the
skip branch with the fade path costs nothing.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from fastebm.compiler.lazy_tensors import Coefficient, LazyTensor, lazy, scaled, total
from fastebm.compiler.operations import Convolution, LinearCombination, Pair
from fastebm.compiler.program import Program, Rewriter

Term = tuple[str, Coefficient]


def merge_branches(program: Program) -> Iterator[Program]:
    """Programs in which two terms of one sum are one."""
    for node in program:
        if not isinstance(node.operation, LinearCombination):
            continue
        terms = list(zip(node.inputs, node.operation.coefficients, strict=True))
        for a, b in itertools.combinations(range(len(terms)), 2):
            operation = _sum(program, terms[a], terms[b])
            if operation is not None:
                edit = Rewriter(program, node)
                rest = [term for i, term in enumerate(terms) if i not in (a, b)]
                name = edit.add(operation, *program[terms[a][0]].inputs)
                coefficients = (*(c for _, c in rest), 1.0)
                yield edit.finish(LinearCombination(coefficients), *(other for other, _ in rest), name)


def _sum(program: Program, *terms: Term) -> Convolution | None:
    """The convolution that the two terms together are, if they are one."""
    nodes = [program[name] for name, _ in terms]
    operations = [node.operation for node in nodes if isinstance(node.operation, Convolution)]
    if len(operations) < 2 or nodes[0].inputs != nodes[1].inputs:
        return None
    if any(program.only_user(node.name) is None for node in nodes):
        return None
    large, small = sorted(operations, key=lambda operation: operation.kernel, reverse=True)
    alike = replace(large, weight=small.weight, bias=small.bias, padding=small.padding) == small
    border = _border(large, small)
    if not alike or border is None:
        return None
    parts = [(operation, c) for operation, (_, c) in zip(operations, terms, strict=True)]
    weights = [scaled(_widened(operation, large, border), c) for operation, c in parts]
    biases = [None if operation.bias is None else scaled(operation.bias, c) for operation, c in parts]
    return replace(large, weight=total(weights) or large.weight, bias=total(biases))


def _border(large: Convolution, small: Convolution) -> Pair | None:
    """The zeros around the smaller kernel that make it the larger, None where they don't."""
    differences = [k - q for k, q in zip(large.kernel, small.kernel, strict=True)]
    paddings = [p - q for p, q in zip(large.padding, small.padding, strict=True)]
    if large.kernel != small.kernel and not large.plain:
        return None
    if any(d < 0 or d != 2 * p for d, p in zip(differences, paddings, strict=True)):
        return None
    return paddings[0], paddings[1]


def _widened(operation: Convolution, large: Convolution, border: Pair) -> LazyTensor:
    same = operation.kernel == large.kernel
    return operation.weight if same else lazy(_with_border, operation.weight, border)


def _with_border(weight: Tensor, border: Pair) -> Tensor:
    return F.pad(weight, (border[1], border[1], border[0], border[0]))
