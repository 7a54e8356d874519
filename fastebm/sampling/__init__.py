"""Samplers of energies: Langevin and microcanonical chains with explicit state, cascades, schedules."""

from fastebm.sampling import schedules
from fastebm.sampling.cascade import Cascade, ExpandingCascade
from fastebm.sampling.data_term import data_term_weight, implicit_step
from fastebm.sampling.langevin import Langevin
from fastebm.sampling.mclmc import MCLMC, AdjustedMCLMC
from fastebm.sampling.schedules import Schedule, constant, cosine, from_epsilon, linear, per_chain, polynomial, table
from fastebm.sampling.state import ChainState, StepInfo

__all__ = [
    "MCLMC",
    "AdjustedMCLMC",
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
    "per_chain",
    "polynomial",
    "schedules",
    "table",
]
