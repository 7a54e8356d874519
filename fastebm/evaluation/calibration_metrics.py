"""What is left for an energy to do on a generator that it calibrates: one-pass samples beside the ends of chains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastebm.evaluation.energy_metrics import Energy, energies
from fastebm.sampling import Langevin
from fastebm.training import DataTerm, calibrate, calibration_loss, noise_floor


@dataclass(frozen=True, eq=False)
class CalibrationMetrics:
    """What an energy thinks of real images, of one-pass samples, and of where short chains from those end.

    Attributes:
        count: real images, and as many samples.
        energy_data, energy_samples, energy_ends: mean energies, low meaning real; None for ends that are not finite.
        energy_data_std: standard deviation of the energies of real images, the scale to see gaps on.
        num_steps: of a chain, as in training.
        distance: mean of ||end - sample||^2, what calibration has left; None for ends that are not finite.
        noise_floor: the same of a chain that noise alone moves.
        ends: where chains end, clamped to [-1, 1]; only those that are finite.
    """

    count: int
    energy_data: float
    energy_data_std: float
    energy_samples: float
    energy_ends: float | None
    num_steps: int
    distance: float | None
    noise_floor: float
    ends: Tensor

    @property
    def gap(self) -> float:
        """Energy of samples minus that of data: near 0 where the generator has learned what the energy knows."""
        return self.energy_samples - self.energy_data

    @property
    def gap_ends(self) -> float | None:
        """Energy of chain ends minus that of data: near 0 where chains do what one pass should."""
        return None if self.energy_ends is None else self.energy_ends - self.energy_data

    def to_json(self) -> dict[str, Any]:
        numbers = {name: value for name, value in vars(self).items() if name != "ends"}
        numbers |= {"gap": self.gap, "gap_ends": self.gap_ends}
        return {name: value if value is None or math.isfinite(value) else None for name, value in numbers.items()}


def calibration_metrics(
    energy: Energy,
    samples: Tensor,
    real: Tensor,
    *,
    step_size: float,
    noise_std: float,
    num_steps: int,
    data_term: DataTerm | None = None,
    seed: int = 0,
) -> CalibrationMetrics:
    """The gaps that `energy` sees at one-pass samples and after chains, images (N, C, H, W) in [-1, 1].

    Args:
        step_size, noise_std, num_steps, data_term: of the chains that the generator was calibrated by.
        seed: of their noise.

    Raises ValueError for images of different shapes or none.

    Example:
        >>> import torch
        >>> from fastebm.evaluation import calibration_metrics
        >>> real, samples = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)
        >>> energy = lambda x: x.square().sum((1, 2, 3))
        >>> health = calibration_metrics(energy, samples, real, step_size=0.1, noise_std=0.0, num_steps=10)
        >>> health.gap, round(health.gap_ends, 3)
        (4.0, 0.046)
    """
    if samples.shape[1:] != real.shape[1:] or not len(samples) or not len(real):
        raise ValueError(f"samples and real images must be alike, got {tuple(samples.shape)} and {tuple(real.shape)}")
    count = min(len(samples), len(real))
    samples, real = samples[:count], real[:count]
    sampler = Langevin(energy, step_size, noise_std)
    # The ids of these chains begin where nobody's samples do.
    ends = calibrate(samples, sampler, num_steps, seed, chain_ids=2**40, data_term=data_term, check=False)
    finite = ends.flatten(1).isfinite().all(dim=1)
    of_data, of_samples = energies(energy, real), energies(energy, samples)
    whole = bool(finite.all())
    return CalibrationMetrics(
        count=count,
        energy_data=float(of_data.mean()),
        energy_data_std=float(of_data.std(correction=0)),
        energy_samples=float(of_samples.mean()),
        energy_ends=float(energies(energy, ends).mean()) if whole else None,
        num_steps=num_steps,
        distance=float(calibration_loss(samples, ends)) if whole else None,
        noise_floor=noise_floor(sampler, num_steps, samples[0].numel()),
        ends=ends[finite].clamp(-1, 1),
    )
