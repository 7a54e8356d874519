"""An EC-VAE run in memory: its nets, its optimizers, and what an update is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastebm.data import add_noise
from fastebm.models.vae import kl_to_prior, squared_error
from fastebm.training.board import Board
from fastebm.training.calibration import DualUpdate, calibration_loss
from fastebm.training.checkpoints import Checkpoint
from fastebm.training.ec_vae_config import EcVaeConfig
from fastebm.training.ec_vae_run import CURVES, EcVaeRun, new_energy
from fastebm.training.energy_side import EnergySide, Health, numbers_of, step
from fastebm.training.image_levels import ImageLevels
from fastebm.training.loop import gradient_norm, optimizer_tensors, part, restore_optimizer
from fastebm.training.pictures import GRID
from fastebm.training.run import RunFolder
from fastebm.training.vae_loop import VaeLoop
from fastebm.training.vae_run import save_pictures


class EcVaeTrainer(VaeLoop):
    """VAE, averaged VAE, energy, an optimizer for each, and the weight of the calibration.

    An update, as the authors' demo orders it: a step of the VAE, whose calibration comes from a chain that starts at
    its own samples; the same latent vectors decoded anew; a second chain from these; a step of the energy.
    """

    remedy = "a smaller energy_learning_rate or a larger energy_l2"
    config: EcVaeConfig

    def __init__(self, config: EcVaeConfig, images: ImageLevels, device: torch.device) -> None:
        super().__init__(config, images, device)

    def start(self) -> None:
        super().start()
        self.weight = self.config.lambda_start
        energy = new_energy(self.config)
        self.energy = None if energy is None else EnergySide(self.config, energy.to(self.device))

    @property
    def calibrating(self) -> bool:
        """Whether the next update calibrates: there is an energy, and the warm-up is over."""
        return self.energy is not None and self.iteration >= self.config.warmup

    def describe(self) -> dict[str, Any]:
        line = {"size": self.config.size, "learning_rate": self.config.learning_rate * self.rate}
        if self.energy is not None:
            line |= {"energy_learning_rate": self.config.energy_learning_rate * self.rate}
            line |= {"lambda": self.weight if self.calibrating else 0.0, "noise_floor": self.config.noise_floor}
        return line

    def watched(self, health: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        names = {"error": "squared_error", "kl": "kl", "calibration": "calibration", "gap": "gap"}
        size = self.config.size
        return f"{size}x{size}", {shown: health[name] for shown, name in names.items() if name in health}

    def update(self) -> dict[str, float]:
        first, rate = self.images_seen, self.rate
        real = self._real_images(first)
        z = self.vae.prior(len(real), self.seed, first)
        found, draws, ends = self._vae_gradient(real, z, first)
        health = numbers_of(found)
        self._check_finite(health)
        self._step_vae(rate)
        if self.energy is not None:
            health |= self._energy_step(self.energy, real, torch.cat((draws, z)), ends, first, rate)
            if self.calibrating:
                self.weight = self._dual_update(self.weight, health["calibration"])
        self.iteration += 1
        return health

    def _vae_gradient(self, real: Tensor, z: Tensor, first: int) -> tuple[Health, Tensor, Tensor | None]:
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

    def _energy_step(
        self, energy: EnergySide, real: Tensor, z: Tensor, ends: Tensor | None, first: int, rate: float
    ) -> dict[str, float]:
        """One step of the energy, on chains from the new decoder or on those that calibrated the old one.

        `z` are draws from the posteriors of `real`, and then from the prior, decoded together as before.
        """
        if ends is None or self.config.chains == 2:
            with torch.no_grad(), self._precision():
                samples = self.vae.decode(z).float()[len(real) :]
            ends = energy.chain_ends(samples, self.seed, first, step=self.config.steps)
        if self.config.data_noise:
            real = add_noise(real, self.config.data_noise, seed=self.seed, positions=first)
        with self._precision():
            health = numbers_of(energy.gradient(real, ends))
        self.guard.check(self.iteration + 1, health)
        step(energy.optimizer, self.config.energy_learning_rate * rate)
        return health

    def _dual_update(self, weight: float, distance: float) -> float:
        config = self.config
        return DualUpdate(config.dual_rate, config.threshold, config.lambda_max)(weight, distance)

    def examine(self) -> None:
        """Lets the guard see energies under the weights that are about to be saved, which no update has come from yet.

        The chains are those that the next update would start, but for batch norm's statistics, and leave no trace.
        """
        if self.energy is None:
            return
        real = self.images.first(self.config.size, self.config.batch_size, self.device)
        samples = self.vae.sample(self.config.batch_size, self.seed, self.images_seen)
        ends = self.energy.chain_ends(samples, self.seed, self.images_seen)
        self.guard.check(self.iteration, self.energy.largest(real, ends) | {"gradient_norm": 0.0})

    def save_pictures(self, folder: RunFolder, board: Board) -> None:
        energy = None if self.energy is None else self.energy.net
        ready = self._settled()
        run = EcVaeRun(folder.path, self.config, self.iteration, ready, energy)
        real = self.images.first(self.config.size, GRID**2)
        reconstructions = [("reconstructions", run.reconstruct(real.to(self.device)))]
        save_pictures(run, self.vae, self.average, real, reconstructions, CURVES, folder, board)

    def tensors(self) -> dict[str, Tensor]:
        named = super().tensors()
        if self.energy is not None:
            named |= {f"energy.{name}": tensor for name, tensor in self.energy.net.state_dict().items()}
            named |= optimizer_tensors(self.energy.optimizer, "energy_optimizer.")
        return named

    def state(self) -> dict[str, Any]:
        return super().state() | {"lambda": self.weight}

    def take_up(self, checkpoint: Checkpoint) -> None:
        super().take_up(checkpoint)
        self.weight = float(checkpoint.state["lambda"])
        if self.energy is not None:
            self.energy.net.load_state_dict(part(checkpoint.tensors, "energy."))
            restore_optimizer(self.energy.optimizer, checkpoint.tensors, "energy_optimizer.")
