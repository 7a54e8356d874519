"""`VAERun`: the base class of runs that train a VAE: sampling, weights from checkpoints, pictures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastebm.models import VAE
from fastebm.plotting import GRID, Curves
from fastebm.runs.checkpoints import Checkpoint, Layout
from fastebm.runs.folder import RunFolder
from fastebm.runs.nets import outline, with_weights
from fastebm.runs.run import Run
from fastebm.training.calibration.config import VAEConfig
from fastebm.training.calibration.energy import generator_layout
from fastebm.training.pictures import save_run_pictures
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.weights import fork_rng, select_prefix

Weights = Literal["average", "trained"]
BN_UPDATE_BATCHES = 16


@dataclass(frozen=True, repr=False)
class VAERun(Run):
    """A run that trained a VAE.

    Attributes:
        vae: in eval mode, its parameters without gradients.
    """

    config: VAEConfig
    vae: VAE

    def sample(
        self,
        count: int,
        seed: int | None = None,
        *,
        batch_size: int = 1000,
        progress: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Images by one pass of the decoder, without a chain; arguments as of `Run.sample`.

        `dtype` is that of the decoder, float32 or bfloat16. There is no bar to show.
        """
        return self.vae.sample(count, *self._key(seed), batch_size=batch_size, dtype=dtype)

    @staticmethod
    def layout(config: VAEConfig, iteration: int) -> Layout:
        return generator_layout(config, "vae", outline(lambda: new_vae(config)))


def new_vae(config: VAEConfig) -> VAE:
    """A VAE with weights drawn from the config's seed."""
    with fork_rng(config.seed):
        return VAE(
            config.size,
            config.channels,
            latent=config.latent,
            width=config.width,
            max_width=config.max_width,
            variance=config.kl_weight / 2,
            learned_variance=config.learned_variance,
            spectral_norm=config.spectral_norm,
        )


def stored_vae(config: VAEConfig, checkpoint: Checkpoint, weights: Weights, device: torch.device | str | None) -> VAE:
    """The VAE of a checkpoint for sampling, with its averaged weights or those trained last."""
    averaged = weights == "average" and config.ema
    tensors = select_prefix(checkpoint.tensors, "average." if averaged else "vae.")
    return with_weights(outline(lambda: new_vae(config)), tensors, device)


def with_updated_bn(vae: VAE, config: VAEConfig, images: Tensor) -> VAE:
    """An independent copy for sampling, with batch norm's statistics measured on real `images` and the prior."""
    ready = copy.deepcopy(vae).eval().requires_grad_(False)
    ready.update_bn(images, batches=BN_UPDATE_BATCHES, batch_size=config.batch_size, seed=config.seed)
    return ready


def save_vae_pictures(
    run: VAERun,
    trained: VAE,
    real: Tensor,
    reconstructions: Sequence[tuple[str, Tensor]],
    curves: Curves,
    folder: RunFolder,
    board: TensorBoardWriter,
) -> None:
    """The pictures of every method, and weights.png (`weight_variants`) and reconstructions.png."""
    panels = {
        "weights": weight_variants(run, trained),
        "reconstructions": [("real images", real), *reconstructions],
    }
    save_run_pictures(run, run.sample(GRID**2), real, folder, board, curves, panels)


def weight_variants(run: VAERun, trained: VAE, count: int = GRID**2) -> list[tuple[str, Tensor]]:
    """Titles and images: the first samples of `run` by the `trained` and by the averaged weights.

    Each is drawn with the running statistics of batch norm (measured anew for the averaged weights) and with those of
    this batch.
    """
    z = run.vae.prior(count, run.config.seed, run.config.total_chains)
    return [
        (f"{name} weights, {statistics} statistics", _decode(vae, z, statistics == "batch"))
        for name, vae in (("trained", trained), ("averaged", run.vae))
        for statistics in ("running", "batch")
    ]


@torch.no_grad()
def _decode(vae: VAE, z: Tensor, batch_statistics: bool) -> Tensor:
    """Images of latent vectors, with batch norm's running statistics or this batch's; the net is not changed."""
    return copy.deepcopy(vae).train(batch_statistics).decode(z)
