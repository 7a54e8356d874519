"""Fused operators: each has a reference in plain PyTorch, and C++, Triton and CUDA implementations behind one name."""

from . import backends, schemas
from .activations import ACTIVATIONS, activation
from .backends import backend
from .block_tail import block_tail
from .chain import CALL_STEPS, advance_chain, call_steps, prefer_fused_chain
from .expand_blend import expand_blend
from .lane_samplers import LaneSampler, SamplerOptions, advance_sampler, sampler_steps
from .lanes import CompiledLanes
from .langevin import langevin_step, langevin_step_
from .mala import mala_step_, metropolis_
from .mclmc import mclmc_step_
from .normal import normal
from .program import CompiledProgram, LoweredProgram
from .underdamped import baoab_step_, kinetic_energy, leapfrog_, obabo_step_
from .uniform import uniform
from .weight_gradients import WeightKind, WeightTask, encode_tasks, weight_gradients_

__all__ = [
    "ACTIVATIONS",
    "CALL_STEPS",
    "CompiledLanes",
    "CompiledProgram",
    "LaneSampler",
    "LoweredProgram",
    "SamplerOptions",
    "WeightKind",
    "WeightTask",
    "activation",
    "advance_chain",
    "advance_sampler",
    "backend",
    "backends",
    "baoab_step_",
    "block_tail",
    "call_steps",
    "encode_tasks",
    "expand_blend",
    "kinetic_energy",
    "langevin_step",
    "langevin_step_",
    "leapfrog_",
    "mala_step_",
    "mclmc_step_",
    "metropolis_",
    "normal",
    "obabo_step_",
    "prefer_fused_chain",
    "sampler_steps",
    "schemas",
    "uniform",
    "weight_gradients_",
]
