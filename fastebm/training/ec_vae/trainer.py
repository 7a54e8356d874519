"""Training of EC-VAE: an update of the VAE, and of its energy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fastebm.models.vae import kl_to_prior, squared_error
from fastebm.plotting import GRID
from fastebm.runs.folder import RunFolder
from fastebm.training.calibration.calibrate import calibration_loss
from fastebm.training.calibration.energy import EnergyTrainer
from fastebm.training.calibration.generator_trainer import CalibratedTrainer
from fastebm.training.calibration.vae_run import save_vae_pictures
from fastebm.training.calibration.vae_trainer import VAETrainer
from fastebm.training.ec_vae.config import ECVAEConfig
from fastebm.training.ec_vae.run import CURVES, ECVAERun
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.metrics import Metrics, gradient_norm, to_floats


class ECVAETrainer(CalibratedTrainer, VAETrainer):
    """Trains a VAE and the energy that calibrates it.

    An update has the order of the authors' demo. The VAE takes a step, whose calibration loss comes from a chain that
    starts at its own samples. The same latent vectors are decoded again, and a second chain starts there. Then the
    energy takes a step.
    """

    run_type = ECVAERun
    hint = "a smaller energy_learning_rate or a larger energy_l2"
    progress_keys: ClassVar[Mapping[str, str]] = {
        "error": "squared_error", "kl": "kl", "calibration": "calibration", "gap": "gap",
    }  # fmt: skip
    config: ECVAEConfig

    def update(self) -> dict[str, float]:
        first, lr_factor = self.images_seen, self.lr_factor
        real = self._real_images(first)
        z = self.vae.prior(len(real), self.seed, first)
        vae_metrics, draws, ends = self._vae_gradient(real, z, first)
        metrics = to_floats(vae_metrics)
        self._check_finite(self.iteration + 1, metrics)
        self._step_generator(lr_factor)
        if self.energy is not None:
            if ends is None or self.config.num_chains == 2:
                ends = self._second_chain_ends(self.energy, torch.cat((draws, z)), first)
            metrics |= self._step_energy(self.energy, real, ends, first, lr_factor)
            self._update_weight(metrics["calibration"])
        self.iteration += 1
        return metrics

    def _vae_gradient(self, real: Tensor, z: Tensor, first: int) -> tuple[Metrics, Tensor, Tensor | None]:
        """Sets the gradient of the VAE's loss.

        Returns its metrics, the draws from the posterior, detached, and the ends of the chains that started at the
        decoder's samples (None without an energy).
        """
        with self._autocast():
            draws, mean, log_variance = self.vae.posterior(real, self.seed, first)
            # One pass, so that batch norm has the same statistics for both. In two passes the decoder learned to ignore
            # the latent vectors, and under the statistics of one pass it was poor at the other.
            decoded = self.vae.decode(draws if self.energy is None else torch.cat((draws, z))).float()
        images, samples = decoded[: len(real)], decoded[len(real) :]
        error, kl = squared_error(real, images), kl_to_prior(mean.float(), log_variance.float())
        bound = self.vae.bound(error, kl, self.config.dimension)
        # The negative bound, in units of the squared error by the factor 2 * variance, which gets no gradient.
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
        """Ends of chains that start at the decoder that was just updated.

        `z` has the draws from the posteriors and then those from the prior, which are decoded in one pass as before.
        """
        with torch.no_grad(), self._autocast():
            samples = self.vae.decode(z).float()[-self.config.batch_size :]
        return energy.chain_ends(samples, self.seed, first, start_step=self.config.num_steps)

    def check_before_save(self) -> None:
        # Samples have batch norm's running statistics here, where those of the next update will have the batch's.
        if self.energy is None:
            return
        real = self.images.first(self.config.size, self.config.batch_size, self.device)
        self._check_energy(self.energy, real, self.vae.sample(self.config.batch_size, self.seed, self.images_seen))

    def save_pictures(self, folder: RunFolder, board: TensorBoardWriter) -> None:
        energy = None if self.energy is None else self.energy.net
        run = ECVAERun(folder.path, self.config, self.iteration, energy, self._ema_for_sampling())
        real = self.images.first(self.config.size, GRID**2)
        reconstructions = [("reconstructions", run.reconstruct(real.to(self.device)))]
        save_vae_pictures(run, self.vae, real, reconstructions, CURVES, folder, board)
