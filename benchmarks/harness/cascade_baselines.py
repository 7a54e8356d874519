"""Baselines of a cascade: chains at the lowest resolution, upsampling to twice the size, chains there, and so on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.workloads import NOISE_STD, STEP_SIZE, Workload
from fastebm.evaluation.speed import Candidate, Updates
from fastebm.evaluation.speed.baselines import Baseline, chain_baselines
from fastebm.evaluation.speed.eager import Energy, eager_twin
from fastebm.evaluation.speed.energies import gradient_error, true_gradient


@dataclass(frozen=True)
class BaselineCascade:
    """The chains of one baseline through all levels.

    Attributes:
        baselines: one for each size, all of one name and variant.
        updates: of each level; the noise falls to 0 over all of them.
        shape: of the samples, (B, C, S, S).
    """

    baselines: Mapping[int, Baseline]
    updates: Mapping[int, Updates]
    shape: tuple[int, ...]
    device: str

    @property
    def variant(self) -> str:
        return next(iter(self.baselines.values())).variant

    def __call__(self) -> Tensor:
        channels, lowest = self.shape[1], min(self.baselines)
        x = torch.empty(self.shape[0], channels, lowest, lowest, device=self.device).uniform_(-1, 1)
        for size, baseline in self.baselines.items():
            if size != lowest:
                x = F.interpolate(x, scale_factor=2, mode="nearest").clamp_(-1, 1)
            x = baseline.chain(x, self.updates[size])
        return x


def baseline_cascades(
    work: Workload, energies: Mapping[int, nn.Module]
) -> dict[str, list[Callable[[], BaselineCascade]]]:
    """By baseline, what makes the cascade of each of its variants through `energies` of the workload."""
    plain = {size: eager_twin(net) for size, net in energies.items()}
    updates = _updates(work, list(plain))
    found = {size: chain_baselines(net, work.precision, work.device, clamp=None) for size, net in plain.items()}

    def cascade(name: str, index: int) -> BaselineCascade:
        baselines = {size: found[size][name][index]() for size in plain}
        return BaselineCascade(baselines, updates, work.full_shape, work.device)

    variants = next(iter(found.values()))
    return {name: [partial(cascade, name, index) for index in range(len(made))] for name, made in variants.items()}


@dataclass(frozen=True)
class LevelTruths:
    """Samples and true gradients at each size, with which the gradients of a cascade are compared."""

    samples: Mapping[int, Tensor]
    gradients: Mapping[int, Tensor]

    @classmethod
    def of(cls, work: Workload, energies: Mapping[int, Energy]) -> LevelTruths:
        samples = {
            size: 1.6 * torch.rand(work.batch, work.shape[0], size, size, device=work.device) - 0.8 for size in energies
        }
        return cls(samples, {size: true_gradient(eager_twin(energies[size]), x) for size, x in samples.items()})

    def error(self, gradients: Mapping[int, Callable[[Tensor], tuple[Tensor, Tensor]]]) -> float:
        """The largest error of the gradients by size."""
        return max(
            gradient_error(gradient, self.samples[size], self.gradients[size]) for size, gradient in gradients.items()
        )

    def candidate(self, cascade: BaselineCascade) -> Candidate:
        gradients = {size: baseline.gradient for size, baseline in cascade.baselines.items()}
        return Candidate(cascade.variant, cascade, lambda: self.error(gradients))


def _updates(work: Workload, sizes: list[int]) -> dict[int, Updates]:
    count = work.num_steps * len(sizes)
    noise = [NOISE_STD * (1 - k / max(1, count - 1)) for k in range(count)]
    found = {}
    for level, size in enumerate(sizes):
        part = noise[level * work.num_steps : (level + 1) * work.num_steps]
        found[size] = Updates(tuple((STEP_SIZE, std) for std in part), clamp=None)
    return found
