"""Convolutions of the same input whose results are added become one convolution.

    a * conv1(h) + b * conv2(h) = conv'(h),  weight' = a * weight1 + b * weight2

A smaller kernel is padded with zeros to the size of the larger one, if its padding is smaller by as much. So in a
growing net, the blend of the skip branch with the fade branch costs nothing.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch.nn.functional as F

from fastebm.compiler.lazy_tensors import Coefficient, LazyTensor, lazy, scale, total
from fastebm.compiler.operations import Convolution, LinearCombination, Pair
from fastebm.compiler.program import Program, Rewriter

Term = tuple[str, Coefficient]


def merge_branches(program: Program) -> Iterator[Program]:
    """Programs in which one convolution replaces two terms of one sum."""
    for node in program:
        if not isinstance(node.operation, LinearCombination):
            continue
        terms = list(zip(node.inputs, node.operation.coefficients, strict=True))
        for a, b in itertools.combinations(range(len(terms)), 2):
            merged = _merge(program, terms[a], terms[b])
            if merged is not None:
                rewriter = Rewriter(program, node)
                others = [term for i, term in enumerate(terms) if i not in (a, b)]
                name = rewriter.add(merged, *program[terms[a][0]].inputs)
                coefficients = (*(c for _, c in others), 1.0)
                yield rewriter.finish(LinearCombination(coefficients), *(other for other, _ in others), name)


def _merge(program: Program, *terms: Term) -> Convolution | None:
    """The convolution that computes the sum of the two terms, if there is one."""
    nodes = [program[name] for name, _ in terms]
    operations = [node.operation for node in nodes if isinstance(node.operation, Convolution)]
    if len(operations) < 2 or nodes[0].inputs != nodes[1].inputs:
        return None
    if any(program.only_user(node.name) is None for node in nodes):
        return None
    large, small = sorted(operations, key=lambda operation: operation.kernel, reverse=True)
    same_settings = replace(large, weight=small.weight, bias=small.bias, padding=small.padding) == small
    border = _border(large, small)
    if not same_settings or border is None:
        return None
    parts = [(operation, c) for operation, (_, c) in zip(operations, terms, strict=True)]
    weights = [scale(_padded_weight(operation, large, border), c) for operation, c in parts]
    biases = [None if operation.bias is None else scale(operation.bias, c) for operation, c in parts]
    return replace(large, weight=total(weights) or large.weight, bias=total(biases))


def _border(large: Convolution, small: Convolution) -> Pair | None:
    """The zeros around the smaller kernel that make it equivalent to one of the larger size, if that is possible."""
    differences = [k - q for k, q in zip(large.kernel, small.kernel, strict=True)]
    paddings = [p - q for p, q in zip(large.padding, small.padding, strict=True)]
    if large.kernel != small.kernel and not large.plain:
        return None
    if any(d < 0 or d != 2 * p for d, p in zip(differences, paddings, strict=True)):
        return None
    return paddings[0], paddings[1]


def _padded_weight(operation: Convolution, large: Convolution, border: Pair) -> LazyTensor:
    if operation.kernel == large.kernel:
        return operation.weight
    return lazy(F.pad, operation.weight, (border[1], border[1], border[0], border[0]))
