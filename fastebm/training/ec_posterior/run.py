"""`ECPosteriorRun`: a run of the calibrated posterior, loaded from its folder for sampling."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastebm.plotting import Curves
from fastebm.runs.run import trained_checkpoint
from fastebm.training.calibration.vae_run import VAERun, Weights, stored_vae
from fastebm.training.ec_posterior.config import ECPosteriorConfig
from fastebm.training.ec_posterior.posterior import refine_posterior

CURVES: Curves = (
    ("squared error of an image", {"squared_error": "at the encoder's draws", "refined_error": "at refined ones"}),
    ("nats", {"kl": "KL to the prior", "nll": "-log q of refined draws"}),
    ("nats of an image", {"elbo": "ELBO at the encoder's draws"}),
    ("squared distance", {"refinement": "chain from its start", "noise_floor": "of noise alone"}),
    ("gradient norm", {"gradient_norm_encoder": "encoder", "gradient_norm_decoder": "decoder"}),
)


@dataclass(frozen=True, repr=False)
class ECPosteriorRun(VAERun):
    """A run of the calibrated posterior: its VAE.

    `energy` is None, as this method trains no energy of images: its chains run on latent vectors, whose energy
    `PosteriorEnergy` follows from the VAE.

    Example:
        >>> import tempfile, torch, fastebm
        >>> config = fastebm.training.ECPosteriorConfig(size=8, channels=1, iterations=2, latent=4, width=4)
        >>> run = fastebm.train(config, torch.zeros(9, 1, 8, 8), tempfile.mkdtemp() + "/run", progress=False)
        >>> run.refine(torch.zeros(5, 1, 8, 8)).shape, run.energy is None
        (torch.Size([5, 4]), True)
    """

    config: ECPosteriorConfig
    energy: None = field(default=None, init=False, repr=False)

    @torch.no_grad()
    def refine(
        self,
        images: Tensor,
        z: Tensor | None = None,
        num_steps: int | None = None,
        seed: int = 0,
        *,
        temperature: float | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Latent vectors of images, refined by `refine_posterior` from `z` or else from the encoder's posterior means.

        Args:
            num_steps, temperature: by default as in training.
        """
        # By autograd, because a few steps take less time than compiling the decoder.
        return refine_posterior(
            self.vae,
            images,
            self.vae.encode(images)[0] if z is None else z,
            self.config.num_steps if num_steps is None else num_steps,
            self.config.step_size,
            seed,
            temperature=self.config.temperature if temperature is None else temperature,
            batch_size=batch_size,
            engine="autograd",
        )

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, num_steps: int | None = None, seed: int = 0, *, temperature: float = 0.0
    ) -> Tensor:
        """Images (B, channels, size, size), decoded from their posterior means after `num_steps` Langevin steps.

        Args:
            num_steps: by default as in training; 0 decodes the encoder's means, one pass of each net.
            temperature: 0 walks towards the mode, to the nearest image; 1 draws from the posterior with `seed`.
        """
        return self.vae.decode(self.refine(images, None, num_steps, seed, temperature=temperature))

    @classmethod
    def load(
        cls, run_dir: str | Path, device: torch.device | str | None = None, *, weights: Weights = "average"
    ) -> ECPosteriorRun:
        """The run in a folder, from its newest good checkpoint; arguments and errors as of `ECVAERun.load`."""
        config, checkpoint = trained_checkpoint(run_dir, cls, ECPosteriorConfig)
        return cls(Path(run_dir), config, checkpoint.iteration, stored_vae(config, checkpoint, weights, device))
