"""Fused operators: each has a reference in plain PyTorch, and C++, Triton and CUDA implementations behind one name."""

from . import backends, schemas
from .activations import ACTIVATIONS, activation
from .backends import backend
from .block_tail import block_tail
from .chain import CALL_STEPS, advance_chain, call_steps, prefer_fused_chain
from .expand_blend import expand_blend
from .lanes import CompiledLanes
from .langevin import langevin_step, langevin_step_
from .mclmc import mclmc_step_
from .normal import normal
from .program import CompiledProgram, LoweredProgram
from .uniform import uniform

__all__ = [
    "ACTIVATIONS",
    "CALL_STEPS",
    "CompiledLanes",
    "CompiledProgram",
    "LoweredProgram",
    "activation",
    "advance_chain",
    "backend",
    "backends",
    "block_tail",
    "call_steps",
    "expand_blend",
    "langevin_step",
    "langevin_step_",
    "mclmc_step_",
    "normal",
    "prefer_fused_chain",
    "schemas",
    "uniform",
]
