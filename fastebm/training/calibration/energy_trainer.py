"""The energy that calibrates a generator: new, stored, and as a trainer holds it, with optimizer and sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastebm.models import MultiScaleEnergy
from fastebm.sampling import Langevin
from fastebm.training.calibration.calibrate import DataTerm, calibrate
from fastebm.training.trainer.initial_weights import fork_rng
from fastebm.training.trainer.loop import Metrics, optimizer_tensors, part, restore_optimizer, update_metrics


class EnergyConfig(Protocol):
    """The settings of an energy and of its chains."""

    @property
    def calibrated(self) -> bool: ...
    @property
    def size(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def energy_width(self) -> int: ...
    @property
    def energy_depth(self) -> int: ...
    @property
    def spectral_norm(self) -> bool: ...
    @property
    def seed(self) -> int: ...
    @property
    def energy_learning_rate(self) -> float: ...
    @property
    def adam_betas(self) -> tuple[float, float]: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def step_size(self) -> float: ...
    @property
    def noise_std(self) -> float: ...
    @property
    def data_term_weight(self) -> float: ...
    @property
    def data_term_hinge(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def engine(self) -> Literal["auto", "fused", "autograd"]: ...
    @property
    def energy_l2(self) -> float: ...


def new_energy(config: EnergyConfig) -> MultiScaleEnergy | None:
    """An energy with weights drawn from the config's seed and torch's own generator left alone; None for a plain
    generator."""
    if not config.calibrated:
        return None
    with fork_rng(config.seed):
        return MultiScaleEnergy(
            config.size,
            config.channels,
            width=config.energy_width,
            depth=config.energy_depth,
            spectral_norm=config.spectral_norm,
        )


def stored_energy(
    config: EnergyConfig, tensors: Mapping[str, Tensor], device: torch.device | str | None
) -> MultiScaleEnergy | None:
    """The energy of a checkpoint's tensors, in eval mode, its parameters without gradients; None likewise."""
    energy = new_energy(config)
    if energy is not None:
        energy.to(device).load_state_dict(part(tensors, "energy."))
        energy.eval().requires_grad_(False)
    return energy


class EnergyTrainer:
    """The energy, its optimizer, and the sampler through it, made once: a gradient examines its energy at first use."""

    def __init__(self, config: EnergyConfig, net: MultiScaleEnergy) -> None:
        self.config = config
        self.net = net
        self.optimizer = torch.optim.Adam(net.parameters(), config.energy_learning_rate, config.adam_betas)
        dtype = getattr(torch, config.dtype)
        self.sampler = Langevin(net, config.step_size, config.noise_std, dtype=dtype, engine=config.engine)
        self.data_term = DataTerm(config.data_term_weight, config.data_term_hinge)

    def chain_ends(self, samples: Tensor, seed: int, first: int, start_step: int = 0) -> Tensor:
        """Where the chains end that start at `samples`, the state in float32."""
        # Energies that are not finite are the guard's to report.
        start = samples.detach().contiguous()
        return calibrate(
            start,
            self.sampler,
            self.config.num_steps,
            seed,
            first,
            start_step=start_step,
            data_term=self.data_term,
            check=False,
        )

    def gradient(self, real: Tensor, ends: Tensor) -> Metrics:
        """Sets the gradient of `mean E(data) - mean E(chain ends)`, and returns what the guard and the log ask."""
        # One pass for both, so that one power iteration of the spectral norm serves both.
        images = torch.cat((real, ends))
        energies = self.net(torch.empty_like(images, memory_format=torch.channels_last).copy_(images)).float()
        data, samples = energies[: len(real)], energies[len(real) :]
        loss = data.mean() - samples.mean() + self.config.energy_l2 * energies.square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        return update_metrics(self.net, loss, data, samples)

    @torch.no_grad()
    def largest(self, real: Tensor, ends: Tensor) -> dict[str, float]:
        self.net.eval()
        data, samples = (self.net(images).abs().max().item() for images in (real, ends))
        self.net.train()
        return {"largest_energy_data": data, "largest_energy_samples": samples}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, by name."""
        named = {f"energy.{name}": tensor for name, tensor in self.net.state_dict().items()}
        return named | optimizer_tensors(self.optimizer, "energy_optimizer.")

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `tensors` gave."""
        self.net.load_state_dict(part(tensors, "energy."))
        restore_optimizer(self.optimizer, tensors, "energy_optimizer.")
