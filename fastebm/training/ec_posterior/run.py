"""What a run of the calibrated posterior has learned so far, read from its folder for sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastebm import plotting as pictures
from fastebm.training.calibration.posterior import refine_posterior
from fastebm.training.calibration.vae_run import VAERun, Weights, stored_vae
from fastebm.training.ec_posterior.config import ECPosteriorConfig
from fastebm.training.trainer.loop import trained_checkpoint

CURVES: pictures.Curves = (
    ("squared error of an image", {"squared_error": "at the encoder's draws", "refined_error": "at refined ones"}),
    ("nats", {"kl": "KL to the prior", "nll": "-log q of refined draws"}),
    ("nats of an image", {"elbo": "ELBO at the encoder's draws"}),
    ("squared distance", {"refinement": "chain from its start", "noise_floor": "of noise alone"}),
    ("gradient norm", {"gradient_norm_encoder": "encoder", "gradient_norm_decoder": "decoder"}),
)


@dataclass(frozen=True)
class ECPosteriorRun(VAERun):
    """What a run has learned up to `iteration`: `path`, `config`, `iteration`, and `vae`, in eval mode without
    gradients."""

    config: ECPosteriorConfig

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
        """Latent vectors of images by `refine_posterior` from `z`, by default the posterior means of the encoder.

        Args:
            num_steps, temperature: by default as in training.
        """
        # By autograd: a few steps are over before a program would have been made of the decoder.
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
        """Images (B, channels, size, size) decoded again, from the posterior mean moved by `num_steps` updates.

        Args:
            num_steps: by default as in training; 0 decodes the encoder's means, one pass of each net.
            temperature: 0 walks towards the mode, for the nearest image; 1 draws from the posterior by `seed`.
        """
        return self.vae.decode(self.refine(images, None, num_steps, seed, temperature=temperature))

    @classmethod
    def load(
        cls, run_dir: str | Path, device: torch.device | str | None = None, *, weights: Weights = "average"
    ) -> ECPosteriorRun:
        """The run in a folder, finished or not, as its newest good checkpoint has it, for sampling.

        Arguments and errors as of `ECVAERun.load`.
        """
        config, checkpoint = trained_checkpoint(run_dir, ECPosteriorConfig)
        return cls(Path(run_dir), config, checkpoint.iteration, stored_vae(config, checkpoint, weights, device))
