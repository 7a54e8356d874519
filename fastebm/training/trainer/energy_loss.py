"""The loss of an update of an energy, and its derivatives with respect to the energies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.compiler import WeightGradient
from fastebm.losses import contrastive_divergence, energy_l2
from fastebm.training.trainer.parts import Part


@dataclass(frozen=True)
class EnergyLoss:
    """`mean E(data) - mean E(samples) + l2 * mean E**2`, of a batch that is computed in parts.

    Attributes:
        l2: the weight of the mean squared energy.
    """

    l2: float

    def backward(
        self, gradient: WeightGradient, part: Part, real: Tensor, fake: Tensor, max_batch: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adds the gradient of a part's share of the loss to those that are there.

        Returns that share and the energies of data and samples (B,), all detached. Where there is no program, autograd
        takes `max_batch` pairs of images at a time, or all of them if it is 0.
        """
        signs = torch.ones(2 * len(part), device=real.device)
        signs[len(part) :] = -1.0

        def derivative(energies: Tensor, rows: slice) -> Tensor:
            return (signs[rows] + self.l2 * energies) / part.count

        # Where autograd runs, in a layout in which libraries run convolutions several times faster. A copy, as a gray
        # image does not show its layout in its strides.
        images = torch.cat((real, fake))
        images = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
        energies = gradient.backward(images, derivative, 2 * max_batch or None)
        data, samples = energies[: len(part)], energies[len(part) :]
        loss = contrastive_divergence(data, samples) + self.l2 * energy_l2(energies)
        return loss * part.share, data, samples
