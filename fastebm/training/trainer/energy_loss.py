"""The loss of an update of an energy, and its derivatives with respect to the energies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastebm.compiler import WeightGradient
from fastebm.losses import contrastive_divergence, energy_l2, improved_cd_kl, last_step
from fastebm.sampling.cascade import module_of
from fastebm.training.trainer.config import EnergyTrainerConfig
from fastebm.training.trainer.parts import Part


@dataclass(frozen=True)
class EnergyLoss:
    """`mean E(data) - mean E(samples) + l2 * mean E**2`, of a batch that is computed in parts.

    Attributes:
        l2: the weight of the mean squared energy.
        trim: share of each part's samples, those of the highest energies, that its mean leaves out. It takes one more
            forward pass over the samples.
        penalty: the weight of the mean squared norm of the energy's gradient at the samples. Autograd differentiates
            it, whatever computes the rest.
        contrast: the factor on the first two terms; 0 leaves them out.
        kl, step_size: the weight of `fastebm.losses.improved_cd_kl` after one more step of this size from the samples.
            Autograd differentiates it too.
    """

    l2: float
    trim: float = 0.0
    penalty: float = 0.0
    contrast: float = 1.0
    kl: float = 0.0
    step_size: float = 1.0

    @classmethod
    def of(cls, config: EnergyTrainerConfig, step_size: float, *, contrast: float = 1.0) -> EnergyLoss:
        """The loss that a config asks for, where chains have this step size."""
        return cls(config.energy_l2, config.trim, config.gradient_penalty, contrast, config.chain_kl, step_size)

    def backward(
        self, gradient: WeightGradient, part: Part, real: Tensor, fake: Tensor, max_batch: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adds the gradient of a part's share of the loss to those that are there.

        Returns that share and the energies of data and samples (B,), all detached. Where there is no program, autograd
        takes `max_batch` pairs of images at a time, or all of them if it is 0.
        """
        kept = self._kept(gradient, fake, max_batch)
        signs = torch.full((2 * len(part),), self.contrast, device=real.device)
        signs[len(part) :] = -self.contrast if kept is None else -self.contrast * kept * (len(kept) / kept.sum())

        def derivative(energies: Tensor, rows: slice) -> Tensor:
            return (signs[rows] + self.l2 * energies) / part.count

        # Where autograd runs, in a layout in which libraries run convolutions several times faster. A copy, as a gray
        # image does not show its layout in its strides.
        images = torch.cat((real, fake))
        images = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
        energies = gradient.backward(images, derivative, 2 * max_batch or None)
        data, samples = energies[: len(part)], energies[len(part) :]
        contrastive = contrastive_divergence(data, samples if kept is None else samples[kept > 0])
        loss = self.contrast * contrastive + self.l2 * energy_l2(energies)
        if self.penalty or self.kl:
            loss = loss + self._add_second_order(gradient, part, fake, max_batch)
        return loss * part.share, data, samples

    def _kept(self, gradient: WeightGradient, fake: Tensor, max_batch: int) -> Tensor | None:
        """1 for each sample that the mean takes and 0 for others, (B,); None where it takes all."""
        if not (count := int(self.trim * len(fake))):
            return None
        with torch.no_grad(), _evaluated(gradient):
            energies = torch.cat([gradient.energy(images) for images in fake.split(max_batch or len(fake))])
        kept = torch.ones(len(fake), device=fake.device)
        kept[energies.float().topk(count).indices] = 0
        return kept

    def _add_second_order(self, gradient: WeightGradient, part: Part, fake: Tensor, max_batch: int) -> Tensor:
        """Adds the gradient of the terms that the energy's own gradient is in. Returns their mean over the part."""
        total = torch.zeros((), device=fake.device)
        parameters = list(gradient.parameters().values())
        with torch.enable_grad(), _evaluated(gradient):
            for images in fake.split(max_batch or len(fake)):
                terms = self._second_order(gradient.energy, images.detach()) * len(images)
                found = torch.autograd.grad(terms / part.count, parameters, allow_unused=True)
                for parameter, each in zip(parameters, found, strict=True):
                    if each is not None:
                        parameter.grad = each if parameter.grad is None else parameter.grad.add_(each)
                total = total + terms.detach().float()
        return total / len(part)

    def _second_order(self, energy: Callable[..., Tensor], images: Tensor) -> Tensor:
        """The mean of these terms over images."""
        terms = torch.zeros((), dtype=images.dtype, device=images.device)
        if self.penalty:
            at = images.clone().requires_grad_()
            (slope,) = torch.autograd.grad(energy(at).sum(), at, create_graph=True)
            terms = terms + self.penalty * slope.square().sum() / len(images)
        if self.kl:
            terms = terms + self.kl * improved_cd_kl(energy, last_step(energy, images, self.step_size))
        return terms


def brake(config: EnergyTrainerConfig, gap: float) -> float:
    """The factor on the learning rate of an update with this gap: below 1 where it is above `gap_brake`."""
    return config.gap_brake / gap if 0 < config.gap_brake < gap else 1.0


def beyond_hinge(config: EnergyTrainerConfig, data: Tensor, samples: Tensor) -> bool:
    """Whether the gap of these energies, (B,) each, is above `gap_hinge`. Syncs with the host if there is one."""
    return config.gap_hinge is not None and float(samples.mean() - data.mean()) > config.gap_hinge


@contextmanager
def _evaluated(gradient: WeightGradient) -> Iterator[nn.Module | None]:
    """Within the block the energy's module is in eval mode, where a spectral norm does no power iteration."""
    module = module_of(gradient.energy)
    if module is None or not module.training:
        yield module
        return
    module.eval()
    try:
        yield module
    finally:
        module.train()
