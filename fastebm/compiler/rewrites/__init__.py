"""The algebra that makes energy gradients cheap: exact identities, each a pass that proposes rewritten programs.

A pass is a function from a program to the programs that one application of its identity gives, in the order of the
nodes. It knows nothing of costs: `simplify` takes a proposal where the machine's estimate falls, and goes on until
no pass has a better one. All identities hold to rounding, for odd sizes too; in doubt a pass declines.
"""

from collections.abc import Callable, Iterable, Iterator

from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.cost_model import Machine
from fastebm.compiler.program import Program
from fastebm.compiler.rewrites.activation_matching import match_activations
from fastebm.compiler.rewrites.branch_merging import merge_branches
from fastebm.compiler.rewrites.concatenation_matching import match_concatenations
from fastebm.compiler.rewrites.convolution_composition import compose_convolutions
from fastebm.compiler.rewrites.polyphase import split_polyphase
from fastebm.compiler.rewrites.pooling_fusion import fuse_pooling
from fastebm.compiler.rewrites.pooling_hoisting import hoist_pooling
from fastebm.compiler.rewrites.scale_folding import fold_scales
from fastebm.compiler.rewrites.upsampling_sinking import sink_upsampling

__all__ = ["PASSES", "WITHOUT_POLYPHASE", "Pass", "build_gradient_program", "simplify"]

Pass = Callable[[Program], Iterator[Program]]

# What energies are rewritten by, before they are differentiated: of a strided convolution the backward part is another.
FORWARD: tuple[Pass, ...] = (
    match_activations,
    fold_scales,
    hoist_pooling,
    fuse_pooling,
    sink_upsampling,
    compose_convolutions,
    merge_branches,
)

PASSES: tuple[Pass, ...] = (*FORWARD, match_concatenations, split_polyphase)

# For backends whose convolutions write every phase of an output where it belongs, adjoints need no pass of their own.
WITHOUT_POLYPHASE: tuple[Pass, ...] = tuple(propose for propose in PASSES if propose is not split_polyphase)


def build_gradient_program(
    energies: Program, machine: Machine | None = None, passes: Iterable[Pass] = PASSES
) -> Program:
    """The cheapest program known for energies and their gradient: rewritten, differentiated, and rewritten again."""
    return simplify(differentiate(simplify(energies, machine, FORWARD)), machine, passes)


def simplify(program: Program, machine: Machine | None = None, passes: Iterable[Pass] = PASSES) -> Program:
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
