"""Training of EC-VAE: an update of the VAE, and of its energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from fastebm.training.trainer.metrics import Metrics, to_floats
from fastebm.training.trainer.parts import Part


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
        lr_factor, parts = self.lr_factor, self._parts()
        real = self._next_images(parts)
        drawn = zip(parts, real, strict=True)
        found = self.parts.gradients(self.vae, self.optimizer, lambda each: self._part_gradient(*each), drawn)
        terms, latents, ends = map(list, zip(*found, strict=True))
        metrics = to_floats(self.parts.means(terms, [len(part) for part in parts]) | self._vae_metrics())
        self._check_finite(self.iteration + 1, metrics)
        self._step_generator(lr_factor)
        if self.energy is not None:
            if self.config.num_chains == 2:
                ends = self._second_chain_ends(self.energy, parts, latents)
            metrics |= self._step_energy(self.energy, parts, real, ends, lr_factor)
            self._update_weight(metrics["calibration"])
        self.iteration += 1
        return metrics

    def _part_gradient(self, part: Part, real: Tensor) -> tuple[Metrics, Tensor, Tensor]:
        """Adds the gradient of a part's share of the VAE's loss to those that are there.

        Returns the part's metrics, the latent vectors that were decoded, detached, and the ends of the chains that
        started at the decoder's samples (none without an energy).
        """
        with self._autocast():
            z, mean, log_variance = self.vae.posterior(real, self.seed, part.number)
            # One pass, so that batch norm has the same statistics for both. In two passes the decoder learned to ignore
            # the latent vectors, and under the statistics of one pass it was poor at the other.
            if self.energy is not None:
                z = torch.cat((z, self.vae.prior(len(part), self.seed, part.number)))
            decoded = self.vae.decode(z).float()
        images, samples = decoded[: len(real)], decoded[len(real) :]
        error, kl = squared_error(real, images), kl_to_prior(mean.float(), log_variance.float())
        bound = self.vae.bound(error, kl, self.config.dimension)
        # The negative bound, in units of the squared error by the factor 2 * variance, which gets no gradient.
        loss = -2 * self.vae.log_variance.detach().exp() * bound.elbo.mean()
        numbers = {"elbo": bound.elbo.mean(), "squared_error": error.mean(), "kl": kl.mean()}
        ends = samples.detach()
        if self.energy is not None:
            ends = self.energy.chain_ends(samples, self.seed, part.number)
            numbers["calibration"] = calibration_loss(samples, ends)
            numbers["displacement"] = (ends - samples).abs().mean()
            if self.calibrating:
                loss = loss + self.weight * numbers["calibration"]
        (loss * part.share).backward()
        return {"vae_loss": loss, **numbers}, z.detach(), ends

    def _second_chain_ends(
        self, energy: EnergyTrainer, parts: Sequence[Part], latents: Sequence[Tensor]
    ) -> list[Tensor]:
        """Ends of chains that start at the decoder that was just updated.

        `latents` are, of each part, the draws from the posteriors and then those from the prior, which are decoded in
        one pass as before.
        """

        @torch.no_grad()
        def ends(part: Part, z: Tensor) -> Tensor:
            with self._autocast():
                samples = self.vae.decode(z).float()[-len(part) :]
            return energy.chain_ends(samples, self.seed, part.number, start_step=self.config.num_steps)

        return self.parts.compute(self.vae, lambda each: ends(*each), zip(parts, latents, strict=True))

    def check_before_save(self) -> None:
        # Samples have batch norm's running statistics here, where those of the next update will have the batch's.
        if self.energy is None:
            return
        parts = self._parts()
        real = [self.images.at(self.config.size, part.rows(), self.device) for part in parts]
        self._check_energy(self.energy, real, [self.vae.sample(len(part), self.seed, part.number) for part in parts])

    def save_pictures(self, folder: RunFolder, board: TensorBoardWriter) -> None:
        energy = None if self.energy is None else self.energy.net
        run = ECVAERun(folder.path, self.config, self.iteration, energy, self._ema_for_sampling())
        real = self.images.first(self.config.size, GRID**2)
        reconstructions = [("reconstructions", run.reconstruct(real.to(self.device)))]
        save_vae_pictures(run, self.vae, real, reconstructions, CURVES, folder, board)
