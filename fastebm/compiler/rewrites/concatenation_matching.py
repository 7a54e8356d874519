"""A sum of zero-padded parts that do not overlap is a concatenation.

Such sums are the backward part of a gated linear unit, and of anything else that splits a result into slices.
"""

import itertools
from collections.abc import Iterator

from fastebm.compiler.operations import Concatenate, LinearCombination, Pad
from fastebm.compiler.program import Node, Program, Rewriter


def match_concatenations(program: Program) -> Iterator[Program]:
    """Programs in which a concatenation replaces two terms of one sum."""
    for node in program:
        if not isinstance(node.operation, LinearCombination):
            continue
        terms = list(zip(node.inputs, node.operation.coefficients, strict=True))
        for a, b in itertools.permutations(range(len(terms)), 2):
            first, second = program[terms[a][0]], program[terms[b][0]]
            dim = _concatenated_dim(first, second)
            if dim is None or terms[a][1] != 1 or terms[b][1] != 1:
                continue
            rewriter = Rewriter(program, node)
            others = [term for i, term in enumerate(terms) if i not in (a, b)]
            both = rewriter.add(Concatenate(dim), *first.inputs, *second.inputs)
            coefficients = (*(c for _, c in others), 1.0)
            yield rewriter.finish(LinearCombination(coefficients), *(name for name, _ in others), both)


def _concatenated_dim(first: Node, second: Node) -> int | None:
    """The dimension along which `second` starts where `first` ends, if the two fill it."""
    a, b = first.operation, second.operation
    if not isinstance(a, Pad) or not isinstance(b, Pad) or a.constant or b.constant:
        return None
    if any(a.before) or any(b.after):
        return None
    dims = [dim for dim, n in enumerate(a.after) if n]
    if len(dims) != 1 or any(n for dim, n in enumerate(b.before) if dim != dims[0]):
        return None
    return dims[0] if first.shape[dims[0]] - a.after[dims[0]] == b.before[dims[0]] else None
