"""Training of a VAE: what EC-VAE and the calibrated posterior share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastebm.models import VAE
from fastebm.training.calibration.config import VAEConfig
from fastebm.training.calibration.generator_trainer import GeneratorTrainer
from fastebm.training.calibration.vae_run import BN_UPDATE_BATCHES, new_vae, with_updated_bn


class VAETrainer(GeneratorTrainer):
    """The VAE of a run, its moving average and its optimizer. A method defines the update."""

    prefix = "vae"
    config: VAEConfig
    ema_generator: VAE

    def new_generator(self) -> VAE:
        self.vae = new_vae(self.config).to(self.device)
        return self.vae

    def _real_images(self, first_image: int) -> Tensor:
        real = super()._real_images(first_image)
        return torch.empty_like(real, memory_format=torch.channels_last).copy_(real)

    def _ema_for_sampling(self) -> VAE:
        # The statistics of batch norm are measured for sampling only; the next update overwrites them.
        count = BN_UPDATE_BATCHES * self.config.batch_size
        images = self.images.first(self.config.size, count, self.device)
        return with_updated_bn(self.ema_generator, self.config, images)
