"""The energy that calibrates a generator, as its trainer holds it: net, optimizer, and the sampler through it."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from fastebm.models import MultiScaleEnergy
from fastebm.sampling import Langevin
from fastebm.training.calibration import Anchor, calibrate
from fastebm.training.loop import energy_health

Health = dict[str, Tensor]


class EnergyConfig(Protocol):
    """The settings of an energy and of its chains."""

    @property
    def energy_learning_rate(self) -> float: ...
    @property
    def adam_betas(self) -> tuple[float, float]: ...
    @property
    def steps(self) -> int: ...
    @property
    def step_size(self) -> float: ...
    @property
    def noise_std(self) -> float: ...
    @property
    def anchor_weight(self) -> float: ...
    @property
    def anchor_hinge(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def engine(self) -> Literal["auto", "fused", "autograd"]: ...
    @property
    def energy_l2(self) -> float: ...


class EnergySide:
    """The energy, its optimizer, and the sampler through it, made once: a gradient examines its energy at first use."""

    def __init__(self, config: EnergyConfig, net: MultiScaleEnergy) -> None:
        self.config = config
        self.net = net
        self.optimizer = torch.optim.Adam(net.parameters(), config.energy_learning_rate, config.adam_betas)
        dtype = getattr(torch, config.dtype)
        self.sampler = Langevin(net, config.step_size, config.noise_std, dtype=dtype, engine=config.engine)
        self.anchor = Anchor(config.anchor_weight, config.anchor_hinge)

    def chain_ends(self, samples: Tensor, seed: int, first: int, step: int = 0) -> Tensor:
        """Where the chains end that start at `samples`, the state in float32."""
        # Energies that are not finite are the guard's to report.
        start = samples.detach().contiguous()
        return calibrate(
            start, self.sampler, self.config.steps, seed, first, step=step, anchor=self.anchor, check=False
        )

    def gradient(self, real: Tensor, ends: Tensor) -> Health:
        """Sets the gradient of `mean E(data) - mean E(chain ends)`, and returns what the guard and the log ask."""
        # One pass for both, so that one power iteration of the spectral norm serves both.
        images = torch.cat((real, ends))
        energies = self.net(torch.empty_like(images, memory_format=torch.channels_last).copy_(images)).float()
        data, samples = energies[: len(real)], energies[len(real) :]
        loss = data.mean() - samples.mean() + self.config.energy_l2 * energies.square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        return energy_health(self.net, loss, data, samples)

    @torch.no_grad()
    def largest(self, real: Tensor, ends: Tensor) -> dict[str, float]:
        self.net.eval()
        data, samples = (self.net(images).abs().max().item() for images in (real, ends))
        self.net.train()
        return {"largest_energy_data": data, "largest_energy_samples": samples}


def step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def numbers_of(found: Health) -> dict[str, float]:
    """One copy to the host for all of them."""
    return dict(zip(found, torch.stack([value.detach() for value in found.values()]).tolist(), strict=True))
