"""An EC-VAE run in memory: its nets, its optimizers, and what an update is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fastebm.models.vae import kl_to_prior, squared_error
from fastebm.plotting import GRID
from fastebm.runs.folder import RunFolder
from fastebm.training.calibration.calibrate import calibration_loss
from fastebm.training.calibration.energy_trainer import EnergyTrainer
from fastebm.training.calibration.trainer import CalibratedLoop
from fastebm.training.calibration.vae_run import save_pictures
from fastebm.training.calibration.vae_trainer import VAELoop
from fastebm.training.ec_vae.config import ECVAEConfig
from fastebm.training.ec_vae.run import CURVES, ECVAERun
from fastebm.training.images import ImageLevels
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.loop import Metrics, gradient_norm, to_floats


class ECVAETrainer(CalibratedLoop, VAELoop):
    """VAE, averaged VAE, energy, an optimizer for each, and the weight of the calibration.

    An update, as the authors' demo orders it: a step of the VAE, whose calibration comes from a chain that starts at
    its own samples; the same latent vectors decoded anew; a second chain from these; a step of the energy.
    """

    hint = "a smaller energy_learning_rate or a larger energy_l2"
    shown: ClassVar[Mapping[str, str]] = {
        "error": "squared_error", "kl": "kl", "calibration": "calibration", "gap": "gap",
    }  # fmt: skip
    config: ECVAEConfig

    def __init__(self, config: ECVAEConfig, images: ImageLevels, device: torch.device) -> None:
        super().__init__(config, images, device)

    def update(self) -> dict[str, float]:
        first, rate = self.images_seen, self.rate
        real = self._real_images(first)
        z = self.vae.prior(len(real), self.seed, first)
        found, draws, ends = self._vae_gradient(real, z, first)
        metrics = to_floats(found)
        self._check_finite(self.iteration + 1, metrics)
        self._step_generator(rate)
        if self.energy is not None:
            if ends is None or self.config.num_chains == 2:
                ends = self._second_chain_ends(self.energy, torch.cat((draws, z)), first)
            metrics |= self._energy_step(self.energy, real, ends, first, rate)
            self._update_weight(metrics["calibration"])
        self.iteration += 1
        return metrics

    def _vae_gradient(self, real: Tensor, z: Tensor, first: int) -> tuple[Metrics, Tensor, Tensor | None]:
        """Sets the gradient of the VAE's loss; returns its parts, the draws from the posterior, detached, and the ends
        of the chains from the decoder's samples, where there is an energy."""
        with self._precision():
            draws, mean, log_variance = self.vae.posterior(real, self.seed, first)
            # One pass, so that batch norm has the same statistics for both: else the decoder gives up coding, and
            # evaluated under the statistics of one it is poor at the other.
            decoded = self.vae.decode(draws if self.energy is None else torch.cat((draws, z))).float()
        images, samples = decoded[: len(real)], decoded[len(real) :]
        error, kl = squared_error(real, images), kl_to_prior(mean.float(), log_variance.float())
        bound = self.vae.bound(error, kl, self.config.dimension)
        # In units of the squared error: minus the bound times twice the variance, whose own gradient stays.
        loss = -2 * self.vae.log_variance.detach().exp() * bound.elbo.mean()
        numbers = {"elbo": bound.elbo.mean(), "squared_error": error.mean(), "kl": kl.mean()}
        ends = None
        if self.energy is not None:
            ends = self.energy.chain_ends(samples, self.seed, first)
            numbers["calibration"] = calibration_loss(samples, ends)
            numbers["displacement"] = (ends - samples).abs().mean()
            if self.calibrating:
                loss = loss + self.weight * numbers["calibration"]
        self.optimizer.zero_grad()
        loss.backward()
        norms = {f"gradient_norm_{name}": gradient_norm(net) for name, net in self.vae.named_children()}
        if self.config.learned_variance:
            numbers["variance"] = self.vae.log_variance.exp()
        return {"vae_loss": loss, **numbers, **norms}, draws.detach(), ends

    def _second_chain_ends(self, energy: EnergyTrainer, z: Tensor, first: int) -> Tensor:
        """Ends of chains from the decoder that was just updated.

        `z` are the draws from the posteriors, and then those from the prior, decoded together as before.
        """
        with torch.no_grad(), self._precision():
            samples = self.vae.decode(z).float()[-self.config.batch_size :]
        return energy.chain_ends(samples, self.seed, first, start_step=self.config.num_steps)

    def check_before_save(self) -> None:
        """Lets the guard see energies under the weights that are about to be saved, which no update has come from yet.

        The chains are those that the next update would start, but for batch norm's statistics, and leave no trace.
        """
        if self.energy is None:
            return
        real = self.images.first(self.config.size, self.config.batch_size, self.device)
        self._check_energy(self.energy, real, self.vae.sample(self.config.batch_size, self.seed, self.images_seen))

    def save_pictures(self, folder: RunFolder, board: TensorBoardWriter) -> None:
        energy = None if self.energy is None else self.energy.net
        run = ECVAERun(folder.path, self.config, self.iteration, self._ema_for_sampling(), energy)
        real = self.images.first(self.config.size, GRID**2)
        reconstructions = [("reconstructions", run.reconstruct(real.to(self.device)))]
        save_pictures(run, self.vae, real, reconstructions, CURVES, folder, board)
