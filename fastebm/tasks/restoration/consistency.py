"""Data consistency: the projection of images onto those that agree with a measurement, up to its noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastebm.tasks.arguments import check_number
from fastebm.tasks.restoration.degradations import Degradation, Shape


class DataConsistency(nn.Module):
    """Moves images x to the nearest ones that agree with a measurement y, which is given as `base` = A⁺y.

    Without noise that is the range-null space decomposition x̂ = A⁺y + (I - A⁺A) x (Wang, Yu, Zhang, ICLR 2023), with A
    x̂ equal to the measurement to rounding. With noise of standard deviation σ, x moves only part of the way,

        x̂ = x + λ A⁺(y - A x),   λ = max(0, 1 - σ √rank(A) / ‖A A⁺(y - A x)‖),

    until the residual is σ for each measured number, as it would be for the true image (the discrepancy principle of
    Morozov, 1966). Images with a smaller residual do not move. λ is one number for each image, like the Σ of DDNM+ for
    isotropic noise; here it depends on the residual instead of the step of a diffusion.

    Args:
        degradation: A.
        shape: (C, H, W) of the images.
        noise: σ, in the units of the measurement; not negative.
    """

    def __init__(self, degradation: Degradation, shape: Shape, noise: float = 0.0):
        super().__init__()
        self.degradation = degradation
        self.noise = noise = check_number("the std of the noise", noise, 0)
        self.allowed = noise * math.sqrt(degradation.rank(shape)) if noise else 0.0

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """The moved images, (B, C, H, W) like x and `base`. Raises ValueError where their shapes differ."""
        _check_alike(x, base)
        free = self.degradation.null(x)
        if self.noise == 0:
            return base + free
        lacking = base - (x - free)
        residual_rms = _norms(self.degradation.A(lacking))
        share = (1 - self.allowed / residual_rms.clamp_min(torch.finfo(x.dtype).tiny)).clamp_min(0)
        return x + share[:, None, None, None] * lacking

    def residual_rms(self, x: Tensor, base: Tensor) -> Tensor:
        """(B,) root mean squares of A A⁺(y - A x) over the measured numbers; about σ for the true image."""
        _check_alike(x, base)
        rank = self.degradation.rank((x.shape[1], x.shape[2], x.shape[3]))
        return _norms(self.degradation.A(base) - self.degradation.A(x)) / math.sqrt(rank)


def _check_alike(x: Tensor, base: Tensor) -> None:
    if x.shape[1:] != base.shape[1:]:  # they would be broadcast
        raise ValueError(f"images are {tuple(x.shape[1:])}, and the measurement is of images {tuple(base.shape[1:])}")


def _norms(y: Tensor) -> Tensor:
    return y.flatten(1).square().sum(1).sqrt()
