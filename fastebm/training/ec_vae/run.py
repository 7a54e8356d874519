"""`ECVAERun`: an EC-VAE run, loaded from its folder for sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastebm.models import MultiScaleEnergy
from fastebm.plotting import Curves
from fastebm.runs.run import trained_checkpoint
from fastebm.training.calibration.energy import stored_energy
from fastebm.training.calibration.vae_run import VAERun, Weights, stored_vae
from fastebm.training.ec_vae.config import ECVAEConfig

CURVES: Curves = (
    ("squared error of an image", {"squared_error": "reconstruction"}),
    ("nats", {"kl": "KL to the prior"}),
    ("squared distance", {"calibration": "chain from its start", "noise_floor": "of noise alone"}),
    ("λ", {"lambda": "weight of the calibration"}),
    ("mean energy (low: real)", {"energy_data": "data", "energy_samples": "chain ends"}),
    ("gradient norm", {"gradient_norm": "energy", "gradient_norm_decoder": "decoder"}),
)


@dataclass(frozen=True, repr=False)
class ECVAERun(VAERun):
    """A run of EC-VAE: its VAE, and its energy or None where it trains a plain VAE.

    Example:
        >>> import tempfile, torch, fastebm
        >>> config = fastebm.training.ECVAEConfig(size=8, channels=1, iterations=2, latent=4, width=4, energy_width=4)
        >>> run = fastebm.train(config, torch.zeros(9, 1, 8, 8), tempfile.mkdtemp() + "/run", progress=False)
        >>> run.energy(run.reconstruct(torch.zeros(5, 1, 8, 8))).shape
        torch.Size([5])
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
        """The run in a folder, from its newest good checkpoint; errors as of `Run.load`.

        Args:
            weights: "average" loads the averaged weights (the trained ones where the run averages none), with batch
                norm's statistics measured for them; "trained" loads the last ones, with the statistics of training.
        """
        config, checkpoint = trained_checkpoint(run_dir, cls, ECVAEConfig)
        vae, energy = stored_vae(config, checkpoint, weights, device), stored_energy(config, checkpoint.tensors, device)
        return cls(Path(run_dir), config, checkpoint.iteration, energy, vae)
