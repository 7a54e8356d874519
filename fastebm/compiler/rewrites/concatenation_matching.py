"""Parts that come together again: a sum of parts that zeros surround, none over another, is a concatenation.

The backward part of a gated linear unit, and of whatever else takes slices, is such a sum.
"""

import itertools
from collections.abc import Iterator

from fastebm.compiler.operations import Concatenate, LinearCombination, Pad
from fastebm.compiler.program import Node, Program, Rewriter


def match_concatenations(program: Program) -> Iterator[Program]:
    """Programs in which two terms of one sum are a concatenation."""
    for node in program:
        if not isinstance(node.operation, LinearCombination):
            continue
        terms = list(zip(node.inputs, node.operation.coefficients, strict=True))
        for a, b in itertools.permutations(range(len(terms)), 2):
            first, second = program[terms[a][0]], program[terms[b][0]]
            dim = _joint(first, second)
            if dim is None or terms[a][1] != 1 or terms[b][1] != 1:
                continue
            edit = Rewriter(program, node)
            rest = [term for i, term in enumerate(terms) if i not in (a, b)]
            joined = edit.add(Concatenate(dim), *first.inputs, *second.inputs)
            yield edit.finish(LinearCombination((*(c for _, c in rest), 1.0)), *(name for name, _ in rest), joined)


def _joint(first: Node, second: Node) -> int | None:
    """The dimension along which `second` begins where `first` ends, and both together are the whole."""
    a, b = first.operation, second.operation
    if not isinstance(a, Pad) or not isinstance(b, Pad) or a.constant or b.constant:
        return None
    zeros = (0,) * len(a.before)
    if a.before != zeros or b.after != zeros:
        return None
    dims = [dim for dim, n in enumerate(a.after) if n]
    if len(dims) != 1 or any(n for dim, n in enumerate(b.before) if dim != dims[0]):
        return None
    dim = dims[0]
    whole = first.shape[dim]
    return dim if (whole - a.after[dim]) == b.before[dim] else None
