"""Fused operators, samplers and training for energy-based image models.

>>> import torch, fastebm
>>> energy = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))
>>> sampler = fastebm.Langevin(energy, step_size=0.1, noise_std=0.05)
>>> sampler.sample(torch.zeros(16, 2), num_steps=20, seed=0).shape
torch.Size([16, 2])

Everything is imported when it is first touched, so that `import fastebm` costs little beside `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastebm import (
        compiler,
        data,
        distributed,
        evaluation,
        losses,
        models,
        ops,
        recipes,
        report,
        rng,
        runs,
        sampling,
        tasks,
        training,
    )
    from fastebm.compiler.energy_gradient import EnergyGradient, energy_gradient
    from fastebm.compiler.score import ScoreGradient, score_gradient
    from fastebm.compiler.weight_gradient import WeightGradient, weight_gradient
    from fastebm.ops import langevin_step, langevin_step_
    from fastebm.runs.registry import load
    from fastebm.sampling import (
        GHMC,
        HMC,
        MALA,
        MALT,
        MCLMC,
        AdjustedMCLMC,
        Cascade,
        ExpandingCascade,
        Joint,
        Langevin,
        Minibatches,
        ParallelTempering,
        ReplayBuffer,
        Underdamped,
        diagnostics,
        precompile,
        schedules,
        starts,
    )
    from fastebm.training import resume, train

__version__ = "0.2.0"

# Where each public name is defined; a subpackage is its own place.
_PACKAGES = (
    *(
        "build_extension",
        "cli",
        "compiler",
        "data",
        "distributed",
        "evaluation",
        "losses",
        "models",
        "ops",
        "plotting",
        "recipes",
        "report",
    ),
    *("rng", "runs", "sampling", "tasks", "training"),
)
_NAMES = {
    "AdjustedMCLMC": "fastebm.sampling",
    "Cascade": "fastebm.sampling",
    "EnergyGradient": "fastebm.compiler",
    "ExpandingCascade": "fastebm.sampling",
    "GHMC": "fastebm.sampling",
    "HMC": "fastebm.sampling",
    "Joint": "fastebm.sampling",
    "Langevin": "fastebm.sampling",
    "MALA": "fastebm.sampling",
    "MALT": "fastebm.sampling",
    "ParallelTempering": "fastebm.sampling",
    "ReplayBuffer": "fastebm.sampling",
    "MCLMC": "fastebm.sampling",
    "Minibatches": "fastebm.sampling",
    "ScoreGradient": "fastebm.compiler",
    "Underdamped": "fastebm.sampling",
    "WeightGradient": "fastebm.compiler",
    "diagnostics": "fastebm.sampling",
    "energy_gradient": "fastebm.compiler",
    "langevin_step": "fastebm.ops",
    "langevin_step_": "fastebm.ops",
    "load": "fastebm.runs.registry",
    "precompile": "fastebm.sampling",
    "resume": "fastebm.training",
    "schedules": "fastebm.sampling",
    "score_gradient": "fastebm.compiler",
    "starts": "fastebm.sampling",
    "train": "fastebm.training",
    "weight_gradient": "fastebm.compiler",
}

__all__ = [
    "GHMC",
    "HMC",
    "MALA",
    "MALT",
    "MCLMC",
    "AdjustedMCLMC",
    "Cascade",
    "EnergyGradient",
    "ExpandingCascade",
    "Joint",
    "Langevin",
    "Minibatches",
    "ParallelTempering",
    "ReplayBuffer",
    "ScoreGradient",
    "Underdamped",
    "WeightGradient",
    "compiler",
    "data",
    "diagnostics",
    "distributed",
    "energy_gradient",
    "evaluation",
    "langevin_step",
    "langevin_step_",
    "load",
    "losses",
    "models",
    "ops",
    "precompile",
    "recipes",
    "report",
    "resume",
    "rng",
    "runs",
    "sampling",
    "schedules",
    "score_gradient",
    "starts",
    "tasks",
    "train",
    "training",
    "weight_gradient",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"fastebm.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'fastebm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | {*__all__})
