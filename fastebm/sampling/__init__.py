"""Samplers of energies: Langevin chains with explicit state, coarse-to-fine cascades, schedules, diagnostics."""

from fastebm.sampling import diagnostics, schedules
from fastebm.sampling.cascade import Cascade, ExpandingCascade
from fastebm.sampling.data_term import data_term_weight, implicit_step
from fastebm.sampling.langevin import Langevin
from fastebm.sampling.schedules import Schedule, constant, cosine, from_epsilon, linear, polynomial, table
from fastebm.sampling.state import ChainState, StepInfo

__all__ = [
    "Cascade",
    "ChainState",
    "ExpandingCascade",
    "Langevin",
    "Schedule",
    "StepInfo",
    "constant",
    "cosine",
    "data_term_weight",
    "diagnostics",
    "from_epsilon",
    "implicit_step",
    "linear",
    "polynomial",
    "schedules",
    "table",
]
