"""The result of a restoration, and the optional Langevin steps on restored images ("refinement")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastebm.compiler import EnergyGradient
from fastebm.distributed import shared_rows
from fastebm.sampling import Langevin, linear
from fastebm.sampling.sampler import batch_slices
from fastebm.tasks.arguments import MAX_STEPS, check_number, check_whole, settle
from fastebm.tasks.restoration.consistency import DataConsistency

# Beyond the steps of any search, whose noise is from the same stream.
_REFINEMENT_STEP = 2**31


@dataclass(frozen=True, eq=False)
class RestorationResult:
    """The restored images of B measurements.

    Attributes:
        images: (B, C, H, W), float32, of the start that ended at the lowest energy. They are not clamped: a clamp would
            change what was measured.
        energies: (B,) the minimised energies of that start.
        residual_rms: (B,) root mean square of A x̂ - A A⁺y over the numbers that were measured: rounding without noise,
            and at most the noise's standard deviation with noise.
        starts: (B, restarts) the energies at which all starts ended.
        mean: (B, C, H, W), the mean over all starts, which agrees with the measurement as they do. It has a smaller
            squared error, as the mean of a posterior has, and is blurred where the starts differ.
        latents: (B, latent), of that start; None without a decoder.
    """

    images: Tensor
    energies: Tensor
    residual_rms: Tensor
    starts: Tensor
    mean: Tensor
    latents: Tensor | None = None


@dataclass(frozen=True)
class Refinement:
    """Langevin steps on the restored image, each followed by a projection to images that agree with the measurement.

    Attributes:
        num_steps, step_size: the number and the size of the steps.
        noise_std: the noise of the first step; it falls to 0 linearly.

    Raises ValueError or TypeError for numbers out of range.
    """

    num_steps: int
    step_size: float
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        settle(self, num_steps=check_whole("num_steps of a refinement", self.num_steps, 0, MAX_STEPS))
        settle(self, step_size=check_number("step_size of a refinement", self.step_size, above=0))
        settle(self, noise_std=check_number("noise_std of a refinement", self.noise_std, 0))


def refine(
    result: RestorationResult,
    base: Tensor,
    consistent: DataConsistency,
    energy: EnergyGradient | Callable[[Tensor], Tensor],
    refinement: Refinement,
    seed: int,
    first_chain_id: int,
) -> RestorationResult:
    """`result` with its images refined in agreement with `base` = A⁺y. The energies stay those of the search."""
    noise = linear(refinement.noise_std, 0.0) if refinement.noise_std else 0.0
    images = Langevin(energy, refinement.step_size, noise).sample(
        result.images,
        refinement.num_steps,
        seed,
        first_chain_id,
        start_step=_REFINEMENT_STEP,
        project=lambda x: consistent(x, base),
    )
    return replace(result, images=images, residual_rms=consistent.residual_rms(images, base))


def in_batches(
    count: int, batch_size: int | None, restored: Callable[[int, int], RestorationResult]
) -> RestorationResult:
    """The results of `restored(first, last)` for the measurements of several batches as one."""

    def of(rows: range) -> RestorationResult:
        batches = batch_slices(len(rows), batch_size)
        parts = [restored(rows.start + first, rows.start + last) for first, last in batches]
        latents = [part.latents for part in parts if part.latents is not None]
        return RestorationResult(
            torch.cat([part.images for part in parts]),
            torch.cat([part.energies for part in parts]),
            torch.cat([part.residual_rms for part in parts]),
            torch.cat([part.starts for part in parts]),
            torch.cat([part.mean for part in parts]),
            torch.cat(latents) if latents else None,
        )

    return shared_rows(count, of)
