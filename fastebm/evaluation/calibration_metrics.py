"""Metrics of an energy that calibrates a generator: gaps of one-pass samples and of chains that start from them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastebm.evaluation.energy_metrics import FIRST_CHAIN_ID, Energy, EnergyGap, energies, energy_gap
from fastebm.sampling import Langevin
from fastebm.training import DataTerm, calibrate, calibration_loss, noise_floor


@dataclass(frozen=True, eq=False, kw_only=True)
class CalibrationMetrics(EnergyGap):
    """The energy gap of one-pass samples, and what short chains that start from them change.

    Attributes:
        energy_ends: mean energy of the chains' ends; None if some are not finite.
        num_steps: updates in a chain, as in training.
        distance: mean of ||end - sample||^2, the calibration loss that is left; None if some ends are not finite.
        noise_floor: the same for chains that noise alone moves.
        ends: the chains' ends, clamped to [-1, 1]; only finite ones.
    """

    energy_ends: float | None
    num_steps: int
    distance: float | None
    noise_floor: float
    ends: Tensor

    @property
    def gap_ends(self) -> float | None:
        """Energy of the chains' ends minus energy of data."""
        return None if self.energy_ends is None else self.energy_ends - self.energy_data

    def _derived(self) -> dict[str, float | None]:
        return {"gap_ends": self.gap_ends}


def calibration_metrics(
    energy: Energy,
    samples: Tensor,
    real: Tensor,
    *,
    step_size: float,
    noise_std: float,
    num_steps: int,
    data_term: DataTerm | None = None,
    grad_norm_clip: float | None = None,
    seed: int = 0,
) -> CalibrationMetrics:
    """Metrics of `energy` at one-pass samples and real images (N, C, H, W) in [-1, 1].

    Args:
        step_size, noise_std, num_steps, data_term, grad_norm_clip: of the chains that calibrated the generator.
        seed: of their noise.

    Raises ValueError for images of different shapes or none.

    Example:
        >>> import torch
        >>> from fastebm.evaluation import calibration_metrics
        >>> real, samples = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)
        >>> energy = lambda x: x.square().sum((1, 2, 3))
        >>> metrics = calibration_metrics(energy, samples, real, step_size=0.1, noise_std=0.0, num_steps=10)
        >>> metrics.gap, round(metrics.gap_ends, 3)
        (4.0, 0.046)
    """
    samples, real, gap = energy_gap(energy, samples, real)
    sampler = Langevin(energy, step_size, noise_std, grad_norm_clip=grad_norm_clip)
    ends = calibrate(samples, sampler, num_steps, seed, chain_ids=FIRST_CHAIN_ID, data_term=data_term, check=False)
    finite = ends.flatten(1).isfinite().all(dim=1)
    all_finite = bool(finite.all())
    return CalibrationMetrics(
        **gap,
        energy_ends=float(energies(energy, ends).mean()) if all_finite else None,
        num_steps=num_steps,
        distance=float(calibration_loss(samples, ends)) if all_finite else None,
        noise_floor=noise_floor(sampler, num_steps, samples[0].numel()),
        ends=ends[finite].clamp(-1, 1),
    )
