"""What an EC-VAE run has learned so far, read from its folder for sampling, and its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastebm import plotting as pictures
from fastebm.models import MultiScaleEnergy
from fastebm.training.calibration.energy_trainer import stored_energy
from fastebm.training.calibration.vae_run import VAERun, Weights, stored_vae
from fastebm.training.ec_vae.config import ECVAEConfig
from fastebm.training.trainer.loop import trained_checkpoint

CURVES: pictures.Curves = (
    ("squared error of an image", {"squared_error": "reconstruction"}),
    ("nats", {"kl": "KL to the prior"}),
    ("squared distance", {"calibration": "chain from its start", "noise_floor": "of noise alone"}),
    ("λ", {"lambda": "weight of the calibration"}),
    ("mean energy (low: real)", {"energy_data": "data", "energy_samples": "chain ends"}),
    ("gradient norm", {"gradient_norm": "energy", "gradient_norm_decoder": "decoder"}),
)


@dataclass(frozen=True)
class ECVAERun(VAERun):
    """What a run has learned up to `iteration`.

    Attributes:
        path: the run's folder.
        vae: in eval mode, its parameters without gradients.
        energy: E(x), low meaning real, likewise; None where the run trains a plain VAE.
    """

    config: ECVAEConfig
    energy: MultiScaleEnergy | None

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Decoded posterior means of images (B, channels, size, size) in [-1, 1]."""
        return self.vae.decode(self.vae.encode(images)[0])

    @classmethod
    def load(
        cls, run_dir: str | Path, device: torch.device | str | None = None, *, weights: Weights = "average"
    ) -> ECVAERun:
        """The run in a folder, finished or not, as its newest good checkpoint has it, for sampling.

        Args:
            weights: "average" has the averaged ones (the trained ones where the run averages none), with batch norm's
                statistics measured anew for them; "trained" the last ones, with the statistics of training.

        Raises RunError where there is no such run or it has no checkpoint yet.
        """
        config, checkpoint = trained_checkpoint(run_dir, ECVAEConfig)
        vae, energy = stored_vae(config, checkpoint, weights, device), stored_energy(config, checkpoint.tensors, device)
        return cls(Path(run_dir), config, checkpoint.iteration, vae, energy)
