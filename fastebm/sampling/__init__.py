"""Samplers of energies: explicit chain state, schedules, Langevin dynamics, coarse-to-fine cascades."""

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
    "from_epsilon",
    "implicit_step",
    "linear",
    "polynomial",
    "table",
]
