"""Products that equal an activation become that activation: `h * sigmoid(h)` is silu, `h * h` is square."""

from collections.abc import Iterator

from fastebm.compiler.operations import Activation, Multiply
from fastebm.compiler.program import Program, Rewriter


def match_activations(program: Program) -> Iterator[Program]:
    """Programs in which an activation replaces one product."""
    for node in program:
        if not isinstance(node.operation, Multiply):
            continue
        a, b = node.inputs
        if a == b:
            yield Rewriter(program, node).finish(Activation("square"), a)
        for h, gate in ((a, b), (b, a)):
            if program[gate].operation == Activation("sigmoid") and program[gate].inputs == (h,):
                yield Rewriter(program, node).finish(Activation("silu"), h)
