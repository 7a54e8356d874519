"""fastebm: fused operators, samplers and training for energy-based image models.

>>> import torch, fastebm
>>> energy = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))
>>> sampler = fastebm.Langevin(energy, step_size=0.1, noise_std=0.05)
>>> sampler.sample(torch.zeros(16, 2), num_steps=20, seed=0).shape
torch.Size([16, 2])
"""

from . import compiler, data, models, ops, rng, sampling
from .compiler import EnergyGradient, energy_gradient
from .ops import langevin_step, langevin_step_, normal, uniform
from .sampling import Cascade, ExpandingCascade, Langevin, constant, cosine, from_epsilon, linear, polynomial

__version__ = "0.1.0"

__all__ = [
    "Cascade",
    "EnergyGradient",
    "ExpandingCascade",
    "Langevin",
    "compiler",
    "constant",
    "cosine",
    "data",
    "energy_gradient",
    "from_epsilon",
    "langevin_step",
    "langevin_step_",
    "linear",
    "models",
    "normal",
    "ops",
    "polynomial",
    "rng",
    "sampling",
    "uniform",
]
