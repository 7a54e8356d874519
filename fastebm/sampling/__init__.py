"""Samplers of energies: chains with explicit state, cascades, schedules, starts, replay buffers and diagnostics."""

from fastebm.sampling import diagnostics, schedules, starts
from fastebm.sampling.cascade import Cascade, ExpandingCascade
from fastebm.sampling.data_term import data_term_weight, implicit_step
from fastebm.sampling.first_use import Precompiled, precompile
from fastebm.sampling.hmc import GHMC, HMC, MALT
from fastebm.sampling.joint import Joint
from fastebm.sampling.langevin import Langevin
from fastebm.sampling.mala import MALA
from fastebm.sampling.mclmc import MCLMC, AdjustedMCLMC, AdjustedState, MicrocanonicalInfo, MicrocanonicalState
from fastebm.sampling.metropolis import MetropolisInfo
from fastebm.sampling.minibatches import Minibatches
from fastebm.sampling.proposals import ProposalSampler, StepNoise
from fastebm.sampling.replay_buffer import Draw, ReplayBuffer
from fastebm.sampling.sampler import EnergyState, Sampler
from fastebm.sampling.schedules import (
    Schedule,
    constant,
    cosine,
    from_epsilon,
    linear,
    per_chain,
    piecewise_constant,
    polynomial,
    table,
)
from fastebm.sampling.state import ChainState, SamplerState, StepInfo
from fastebm.sampling.tempering import ParallelTempering, TemperedState
from fastebm.sampling.underdamped import Underdamped, VelocityState

__all__ = [
    "GHMC",
    "HMC",
    "MALA",
    "MALT",
    "MCLMC",
    "AdjustedMCLMC",
    "AdjustedState",
    "Cascade",
    "ChainState",
    "Draw",
    "EnergyState",
    "ExpandingCascade",
    "Joint",
    "Langevin",
    "MetropolisInfo",
    "MicrocanonicalInfo",
    "MicrocanonicalState",
    "Minibatches",
    "ParallelTempering",
    "Precompiled",
    "ProposalSampler",
    "ReplayBuffer",
    "Sampler",
    "SamplerState",
    "Schedule",
    "StepInfo",
    "StepNoise",
    "TemperedState",
    "Underdamped",
    "VelocityState",
    "constant",
    "cosine",
    "data_term_weight",
    "diagnostics",
    "from_epsilon",
    "implicit_step",
    "linear",
    "per_chain",
    "piecewise_constant",
    "polynomial",
    "precompile",
    "schedules",
    "starts",
    "table",
]
