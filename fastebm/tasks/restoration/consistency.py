"""Images that agree with a measurement: exactly, or as far as its noise allows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastebm.tasks.restoration.degradations import Degradation, Shape


class DataConsistency(nn.Module):
    """Moves images x to the nearest that agree with a measurement y, which comes as `base` = A⁺y.

    Without noise that is the range-null space decomposition x̂ = A⁺y + (I - A⁺A) x (Wang, Yu, Zhang, ICLR 2023): A x̂ is
    the measurement to rounding. With noise of std σ it goes only part of the way,

        x̂ = x + λ A⁺(y - A x),   λ = max(0, 1 - σ √rank(A) / ‖A A⁺(y - A x)‖),

    to where the misfit is what the noise alone would leave, σ a measured number (the discrepancy principle of Morozov,
    1966); an x with less misfit stays as it is. λ is one number an image, as the Σ of DDNM+ is for a noise that is the
    same in all directions, but set by the misfit rather than by the step of a diffusion.

    Args:
        degradation: A.
        shape: (C, H, W) of the images.
        noise: σ, in the units of the measurement; not negative.
    """

    def __init__(self, degradation: Degradation, shape: Shape, noise: float = 0.0):
        super().__init__()
        if not (math.isfinite(noise) and noise >= 0):
            raise ValueError(f"the std of the noise must be finite and not negative, got {noise}")
        self.degradation = degradation
        self.noise = noise
        self.allowed = noise * math.sqrt(degradation.rank(shape)) if noise else 0.0

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """Images like x, both (B, C, H, W)."""
        free = self.degradation.null(x)
        if self.noise == 0:
            return base + free
        lacking = base - (x - free)
        residual_rms = _norms(self.degradation.A(lacking))
        share = (1 - self.allowed / residual_rms.clamp_min(torch.finfo(x.dtype).tiny)).clamp_min(0)
        return x + share[:, None, None, None] * lacking

    def residual_rms(self, x: Tensor, base: Tensor) -> Tensor:
        """(B,) root mean squares of A A⁺(y - A x) over the numbers that A measures; about σ for the true image."""
        rank = self.degradation.rank((x.shape[1], x.shape[2], x.shape[3]))
        return _norms(self.degradation.A(base) - self.degradation.A(x)) / math.sqrt(rank)


def _norms(y: Tensor) -> Tensor:
    return y.flatten(1).square().sum(1).sqrt()
