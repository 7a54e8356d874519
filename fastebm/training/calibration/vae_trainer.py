"""What runs that train a VAE share: the VAE, and its average as it is saved."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastebm.models import Vae
from fastebm.training.calibration.generator_trainer import GeneratorConfig, GeneratorLoop
from fastebm.training.calibration.vae_run import SETTLING_BATCHES, VaeConfig, new_vae, settled


class VaeLoopConfig(VaeConfig, GeneratorConfig, Protocol):
    """The settings that train one."""

    @property
    def adam_betas(self) -> tuple[float, float]: ...


class VaeLoop(GeneratorLoop):
    """VAE, averaged VAE and optimizer of a run. A method says what an update is."""

    prefix = "vae"
    config: VaeLoopConfig
    average: Vae

    def new_generator(self) -> Vae:
        self.vae = new_vae(self.config).to(self.device)
        return self.vae

    @property
    def betas(self) -> tuple[float, float]:
        return self.config.adam_betas

    def _real_images(self, first: int) -> Tensor:
        real = super()._real_images(first)
        return torch.empty_like(real, memory_format=torch.channels_last).copy_(real)

    def _ready_average(self) -> Vae:
        # Its statistics are measured for the sake of whoever samples; the next update overwrites them.
        count = SETTLING_BATCHES * self.config.batch_size
        return settled(self.average, self.config, self.images.first(self.config.size, count, self.device))
