"""The rewrites that make energy gradients cheap: exact algebraic identities, one file for each.

A pass is a function from a program to candidate programs; each candidate applies its identity once, in the order of
the nodes. A pass does not consider costs: `simplify` accepts a candidate if the machine's estimated time falls, and
repeats until no pass has a faster candidate. All identities hold up to rounding and for every size; a pass declines
where its identity would not hold. To add a rewrite, write such a pass in a file of its own and list it here.
"""

from collections.abc import Callable, Container, Iterable, Iterator

from fastebm.compiler.autodiff import differentiate, differentiate_weights
from fastebm.compiler.cost_model import Machine
from fastebm.compiler.lazy_tensors import LazyTensor
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

__all__ = [
    "FORWARD",
    "PASSES",
    "WITHOUT_POLYPHASE",
    "Pass",
    "build_gradient_program",
    "build_weight_program",
    "rewritten",
    "simplify",
]

Pass = Callable[[Program], Iterator[Program]]

# Applied before differentiation as well: the backward part then is that of the rewritten forward part.
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
# For the fused kernels, whose transposed convolutions compute each phase of the output by themselves.
WITHOUT_POLYPHASE: tuple[Pass, ...] = tuple(propose for propose in PASSES if propose is not split_polyphase)


def build_gradient_program(
    energies: Program, machine: Machine | None = None, passes: Iterable[Pass] = PASSES
) -> Program:
    """The program for energies and their gradient: simplified, differentiated, and simplified again."""
    return simplify(differentiate(simplify(energies, machine, FORWARD)), machine, passes)


def build_weight_program(
    energies: Program, trained: Container[LazyTensor], machine: Machine | None = None, passes: Iterable[Pass] = PASSES
) -> Program:
    """The program for the gradients of weights: differentiated, and simplified. `energies` is simplified already."""
    return simplify(differentiate_weights(energies, trained), machine, passes)


def simplify(program: Program, machine: Machine | None = None, passes: Iterable[Pass] = PASSES) -> Program:
    """The program after all rewrites that make it faster on `machine`."""
    for _, better in rewritten(program, machine, passes):
        program = better
    return program


def rewritten(
    program: Program, machine: Machine | None = None, passes: Iterable[Pass] = PASSES
) -> Iterator[tuple[Pass, Program]]:
    """The rewrites that make a program faster on `machine`, one by one, each with the program that it gives."""
    machine = machine or Machine()
    passes = tuple(passes)
    changed = True
    while changed:
        changed = False
        for propose in passes:
            while (better := _first_faster(program, machine, propose)) is not None:
                program, changed = better, True
                yield propose, program


def _first_faster(program: Program, machine: Machine, propose: Pass) -> Program | None:
    time = machine.time(program)
    return next((candidate for candidate in propose(program) if machine.time(candidate) < time), None)
