"""What runs that train a VAE share: the VAE, and its average as it is saved."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastebm.models import VAE
from fastebm.training.calibration.generator_trainer import GeneratorConfig, GeneratorLoop
from fastebm.training.calibration.vae_run import BN_UPDATE_BATCHES, VAEConfig, new_vae, with_updated_bn


class VAELoopConfig(VAEConfig, GeneratorConfig, Protocol):
    """The settings that train one."""

    @property
    def adam_betas(self) -> tuple[float, float]: ...


class VAELoop(GeneratorLoop):
    """VAE, averaged VAE and optimizer of a run. A method says what an update is."""

    prefix = "vae"
    config: VAELoopConfig
    average: VAE

    def new_generator(self) -> VAE:
        self.vae = new_vae(self.config).to(self.device)
        return self.vae

    @property
    def betas(self) -> tuple[float, float]:
        return self.config.adam_betas

    def _real_images(self, first: int) -> Tensor:
        real = super()._real_images(first)
        return torch.empty_like(real, memory_format=torch.channels_last).copy_(real)

    def _ema_for_sampling(self) -> VAE:
        # Its statistics are measured for the sake of whoever samples; the next update overwrites them.
        count = BN_UPDATE_BATCHES * self.config.batch_size
        return with_updated_bn(self.average, self.config, self.images.first(self.config.size, count, self.device))
