"""Activations that were written out: `h * sigmoid(h)` is a swish, `h * h` a square. One pass instead of several."""

from collections.abc import Iterator

from fastebm.compiler.operations import Activation, Multiply
from fastebm.compiler.program import Program, Rewriter


def match_activations(program: Program) -> Iterator[Program]:
    """Programs in which one product is the activation that it spells."""
    for node in program:
        if not isinstance(node.operation, Multiply):
            continue
        a, b = node.inputs
        if a == b:
            yield Rewriter(program, node).finish(Activation("square"), a)
        for plain, gate in ((a, b), (b, a)):
            if program[gate].operation == Activation("sigmoid") and program[gate].inputs == (plain,):
                yield Rewriter(program, node).finish(Activation("silu"), plain)
