"""The algebra that makes energy gradients cheap: exact identities, each a pass that proposes rewritten programs.

A pass is a function from a program to the programs that one application of its identity gives, in the order of the
nodes. It knows nothing of costs: `simplified` takes a proposal where the machine's estimate falls, and goes on until
no pass has a better one. All identities hold to rounding, for odd sizes too; in doubt a pass declines.
"""

from collections.abc import Callable, Iterable, Iterator

from fastebm.compiler.cost import Machine
from fastebm.compiler.derivative import differentiated
from fastebm.compiler.program import Program
from fastebm.compiler.rewrites.composed_convolutions import compose_convolutions
from fastebm.compiler.rewrites.early_pooling import pool_early
from fastebm.compiler.rewrites.folded_factors import fold_factors
from fastebm.compiler.rewrites.joined_parts import join_parts
from fastebm.compiler.rewrites.late_upsampling import upsample_late
from fastebm.compiler.rewrites.merged_branches import merge_branches
from fastebm.compiler.rewrites.polyphase import split_by_parity
from fastebm.compiler.rewrites.pooled_convolution import pool_in_convolution
from fastebm.compiler.rewrites.recognized_activations import recognise

__all__ = ["PASSES", "WITHOUT_PARITY", "Pass", "gradient_program", "simplified"]

Pass = Callable[[Program], Iterator[Program]]

# What energies are rewritten by, before they are differentiated: of a strided convolution the backward part is another.
FORWARD: tuple[Pass, ...] = (
    recognise,
    fold_factors,
    pool_early,
    pool_in_convolution,
    upsample_late,
    compose_convolutions,
    merge_branches,
)

PASSES: tuple[Pass, ...] = (*FORWARD, join_parts, split_by_parity)

# For backends whose convolutions write every phase of an output where it belongs, adjoints need no pass of their own.
WITHOUT_PARITY: tuple[Pass, ...] = tuple(propose for propose in PASSES if propose is not split_by_parity)


def gradient_program(energies: Program, machine: Machine | None = None, passes: Iterable[Pass] = PASSES) -> Program:
    """The cheapest program known for energies and their gradient: rewritten, differentiated, and rewritten again."""
    return simplified(differentiated(simplified(energies, machine, FORWARD)), machine, passes)


def simplified(program: Program, machine: Machine | None = None, passes: Iterable[Pass] = PASSES) -> Program:
    """The program after every rewrite that makes it cheaper on `machine`."""
    machine = machine or Machine()
    passes = tuple(passes)
    changed = True
    while changed:
        changed = False
        for propose in passes:
            better = _improved(program, machine, propose)
            while better is not None:
                program, changed = better, True
                better = _improved(program, machine, propose)
    return program


def _improved(program: Program, machine: Machine, propose: Pass) -> Program | None:
    """The first proposal of a pass that is cheaper."""
    time = machine.time(program)
    return next((proposal for proposal in propose(program) if machine.time(proposal) < time), None)
