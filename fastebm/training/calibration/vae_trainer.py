"""Training of a VAE: what EC-VAE and the calibrated posterior share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastebm.models import VAE
from fastebm.runs.nets import initialized
from fastebm.training.calibration.config import VAEConfig
from fastebm.training.calibration.generator_trainer import GeneratorTrainer
from fastebm.training.calibration.vae_run import BN_UPDATE_BATCHES, new_vae, with_updated_bn
from fastebm.training.trainer.metrics import Metrics, gradient_norm
from fastebm.training.trainer.parts import Part


class VAETrainer(GeneratorTrainer):
    """The VAE of a run, its moving average and its optimizer. A method defines the update."""

    prefix = "vae"
    config: VAEConfig
    ema_generator: VAE

    def new_generator(self) -> VAE:
        self.vae = initialized(lambda: new_vae(self.config), self.device)
        return self.vae

    def _real_images(self, part: Part, indices: Tensor) -> Tensor:
        real = super()._real_images(part, indices)
        return torch.empty_like(real, memory_format=torch.channels_last).copy_(real)

    def _vae_metrics(self) -> Metrics:
        """The metrics of the gradients and the parameters, which are the same on all ranks."""
        norms = {f"gradient_norm_{name}": gradient_norm(net) for name, net in self.vae.named_children()}
        return norms | ({"variance": self.vae.log_variance.exp()} if self.config.learned_variance else {})

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        # Around the passes of the VAE alone: chains on its latent vectors must find its own batch norms.
        with super()._autocast(), self.parts.batch_norm_of_all(self.vae):
            yield

    def _ema_for_sampling(self) -> VAE:
        # The statistics of batch norm are measured for sampling only; the next update overwrites them.
        count = BN_UPDATE_BATCHES * self.config.batch_size
        images = self.images.first(self.config.size, count, self.device)
        return with_updated_bn(self.ema_generator, self.config, images)
