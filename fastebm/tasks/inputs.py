"""Inputs of tasks: opens the energy of a run, a run folder or a bare function, and checks images against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fastebm.compiler import EnergyGradient, ScoreGradient, energy_gradient
from fastebm.distributed import shared_rows
from fastebm.runs import registry
from fastebm.sampling import Schedule, piecewise_constant
from fastebm.sampling.cascade import device_of
from fastebm.sampling.sampler import Energy, batch_slices
from fastebm.tasks.arguments import check_layout, check_values
from fastebm.training import CoarseToFineRun, Run


def training_step_size(run: Run | None) -> float:
    """The step size of the chains that trained a run, at its full size; 1 where none did."""
    if isinstance(run, CoarseToFineRun):
        return run.config.step_size_at(run.size)
    return 1.0 if run is None else float(getattr(run.config, "step_size", 1.0))


Model = Run | Energy | str | Path
"""What a task takes: a run, the folder of one, or a bare energy `(B, C, H, W) -> (B,)`, low meaning real."""


@dataclass(frozen=True, eq=False)
class TaskEnergy:
    """The energy of images that a task works with. Build it with `open_energy`.

    Attributes:
        gradient: energies and gradients at full size, in the run's own precision and by its own engine.
        device: the device of the weights, on which chains run.
        shape: (channels, height, width) of the images of a run; None for a bare energy, which takes any.
        gradients: energies and gradients by size, ascending, where chains can start at the lowest; else empty.
        missing_levels: why `gradients` is empty.
        run: None for a bare energy.
    """

    gradient: EnergyGradient
    device: torch.device
    shape: tuple[int, int, int] | None = None
    gradients: Mapping[int, EnergyGradient] = field(default_factory=dict)
    missing_levels: str = "not a bare energy"
    run: Run | None = None

    @property
    def step_size(self) -> float:
        """The step size of the chains that trained the energy at full size; 1 for a bare energy.

        It is the unit of what is measured in steps: the energy of a run with twice the step size is half as large.
        """
        return training_step_size(self.run)

    def growths(self, levels: Iterable[int]) -> dict[int, float]:
        """By what factor the step size of the training at each of `levels` differs from that at full size."""
        if not isinstance(self.run, CoarseToFineRun):
            return dict.fromkeys(levels, 1.0)
        config = self.run.config
        return {level: config.step_size_at(level) / self.step_size for level in levels}

    def step_sizes(self, levels: Iterable[int], step_size: float) -> float | Schedule:
        """The step sizes of a cascade through `levels` whose highest has `step_size`, in proportion to the training."""
        factors = [factor for _, factor in sorted(self.growths(levels).items())]
        return step_size if set(factors) == {1.0} else piecewise_constant(*(step_size * factor for factor in factors))

    def levels(self) -> dict[int, EnergyGradient]:
        """`gradients`, for a cascade. Raises ValueError where there are none."""
        if not self.gradients:
            raise ValueError(f"a cascade needs a run with an energy for each resolution, {self.missing_levels}")
        return dict(self.gradients)

    def levels_from(self, start_size: int | None, size: int) -> dict[int, EnergyGradient]:
        """The levels from `start_size` up; for None the energy at full `size` alone.

        Raises ValueError where there are no levels, or none of that size.
        """
        if start_size is None:
            return {size: self.gradient}
        levels = self.levels()
        if start_size not in levels:
            raise ValueError(f"start_size must be one of the run's levels, {sorted(levels)}, got {start_size}")
        return {size: gradient for size, gradient in levels.items() if size >= start_size}

    def energies(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """The energies (N,) of images (N, C, H, W), `batch_size` at a time.

        Raises FloatingPointError where one is not finite.
        """

        def of(rows: range) -> Tensor:
            batches = batch_slices(len(rows), batch_size)
            return torch.cat([self.gradient(images[rows.start + a : rows.start + b])[0] for a, b in batches])

        energies = shared_rows(len(images), of)
        if not energies.isfinite().all():
            number = int((~energies.isfinite()).nonzero()[0])
            raise FloatingPointError(f"the energy of image {number} is {float(energies[number])}")
        return energies

    def check_images(self, name: str, images: Tensor, *, bounded: bool = True) -> Tensor:
        """`images` on the energy's device, if the energy can work on them.

        Args:
            name: of the images in messages.
            images: float32 (N, C, H, W), N >= 1, finite, in [-1, 1], with the shape of a run's images.
            bounded: False accepts values outside of [-1, 1], as noisy images have them.

        Raises TypeError for another dtype, ValueError for anything else that does not fit.
        """
        check_layout(name, images)
        if self.shape is not None and images.shape[1:] != self.shape:
            raise ValueError(f"{name} are {shape(images.shape[1:])}, and the run takes {shape(self.shape)}")
        check_values(name, images, bounded=bounded)
        return images.detach().to(self.device)


def open_energy(model: Model, engine: str = "auto") -> TaskEnergy:
    """The energy of a run, of the run in a folder (opened on the CPU), or of a bare energy.

    Args:
        engine: as in `energy_gradient`, in place of that of the run's config. "auto" leaves the choice to the run.

    Raises RunError where a folder holds no run; ValueError for a run without an energy of images, and for an engine of
    an `EnergyGradient`, which has its own; TypeError for what is no model.
    """
    opened: Run | Energy = registry.load(model) if isinstance(model, str | Path) else model
    if isinstance(opened, EnergyGradient):
        if engine != "auto":
            raise ValueError(f"engine={engine!r} is of energy_gradient, and this energy is an EnergyGradient already")
        return TaskEnergy(opened, device_of(opened))
    if not isinstance(opened, Run):
        if isinstance(opened, type) or not callable(opened):
            kind = opened.__name__ if isinstance(opened, type) else type(opened).__name__
            raise TypeError(f"a model is a run, the folder of one, or an energy of images, got {kind}")
        if isinstance(opened, ScoreGradient):
            raise TypeError("a task needs energies, and a score tells none")
        gradient = energy_gradient(opened, engine=engine)
        return TaskEnergy(gradient, device_of(gradient))
    if engine != "auto":
        opened = replace(opened, config=replace(opened.config, engine=engine))
    model, config, gradients = opened, opened.config, {}
    # An EC-posterior, a plain VAE and a plain flow have no energy of images.
    energies = model.levels if isinstance(model, CoarseToFineRun) else {model.size: getattr(model, "energy", None)}
    for size, energy in sorted(energies.items()):
        if energy is None:
            raise ValueError(f"{model.path} holds a run of kind {config.kind!r} without an energy of images")
        gradients[size] = energy_gradient(energy, dtype=getattr(torch, config.dtype), engine=config.engine)
    top = gradients[model.size]
    shape = (config.channels, model.size, model.size)
    if isinstance(model, CoarseToFineRun) and model.config.variant == "cascade":
        return TaskEnergy(top, device_of(top), shape, gradients, run=model)
    kind = f"variant {model.config.variant!r}" if isinstance(model, CoarseToFineRun) else f"kind {config.kind!r}"
    return TaskEnergy(top, device_of(top), shape, missing_levels=f"and {model.path} holds one of {kind}", run=model)


def shape(sides: tuple[int, ...] | torch.Size) -> str:
    """Channels, height and width in words: "3x32x32"."""
    return "x".join(map(str, sides))
