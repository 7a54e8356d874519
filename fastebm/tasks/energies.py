"""What a task works with: a bare energy, or a run, whose chains have the run's own precision and engine."""

from __future__ import annotations

import torch

from fastebm.compiler import EnergyGradient, energy_gradient
from fastebm.sampling.cascade import device_of
from fastebm.sampling.langevin import Energy
from fastebm.training import CoarseToFineRun

Model = CoarseToFineRun | Energy
"""An energy `(B, C, H, W) -> (B,)`, low meaning real, as `fastebm.Langevin` takes it; or a run."""


def top_gradient(model: Model) -> EnergyGradient:
    """Energies and gradients at full size: of the energy, or of a run's highest level."""
    if isinstance(model, CoarseToFineRun):
        return _of_level(model, model.size)
    return model if isinstance(model, EnergyGradient) else energy_gradient(model)


def level_gradients(model: Model) -> dict[int, EnergyGradient]:
    """Energies and gradients of all levels by size, ascending, for chains that go up through them.

    Raises ValueError for what has no such levels: a bare energy, and a run with a single growing net.
    """
    if not isinstance(model, CoarseToFineRun):
        raise ValueError("going from coarse to fine needs a run with an energy for each resolution, not a bare energy")
    if model.config.variant != "cascade":
        raise ValueError(
            f"going from coarse to fine needs a run of variant 'cascade'; {model.path} is {model.config.variant!r}, "
            "whose chains do not start at the lowest level"
        )
    return {size: _of_level(model, size) for size in sorted(model.levels)}


def levels_from(model: Model, lowest: int) -> dict[int, EnergyGradient]:
    """The same from size `lowest` on. Raises ValueError as above, and where there is no such level."""
    levels = level_gradients(model)
    if lowest not in levels:
        raise ValueError(f"start_size must be one of the run's levels, {sorted(levels)}, got {lowest}")
    return {size: gradient for size, gradient in levels.items() if size >= lowest}


def device_of_model(model: Model) -> torch.device:
    """Where the weights lie, and chains run."""
    return device_of(model.levels[model.size]) if isinstance(model, CoarseToFineRun) else device_of(model)  # type: ignore[arg-type]


def _of_level(run: CoarseToFineRun, size: int) -> EnergyGradient:
    return energy_gradient(run.levels[size], dtype=getattr(torch, run.config.dtype), engine=run.config.engine)
