"""What runs that train a VAE are read from and drawn by: the net, its samples, its pictures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastebm import plotting as pictures
from fastebm.models import VAE
from fastebm.runs.checkpoints import Checkpoint
from fastebm.runs.folder import RunFolder
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.initial_weights import fork_rng
from fastebm.training.trainer.loop import part

Weights = Literal["average", "trained"]
BN_UPDATE_BATCHES = 16


class VAEConfig(Protocol):
    """The settings that make a VAE, and how much of what its run has."""

    @property
    def size(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def latent(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def max_width(self) -> int: ...
    @property
    def kl_weight(self) -> float: ...
    @property
    def learned_variance(self) -> bool: ...
    @property
    def spectral_norm(self) -> bool: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def ema(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def pictures_every(self) -> int: ...
    @property
    def total_iterations(self) -> int: ...
    @property
    def total_chains(self) -> int: ...


@dataclass(frozen=True)
class VAERun:
    """What a run has learned up to `iteration`.

    Attributes:
        path: the run's folder.
        vae: in eval mode, its parameters without gradients.
    """

    path: Path
    config: VAEConfig
    iteration: int
    vae: VAE

    @property
    def finished(self) -> bool:
        return self.iteration == self.config.total_iterations

    @property
    def size(self) -> int:
        """The resolution of samples."""
        return self.config.size

    def sample(
        self,
        count: int,
        seed: int | None = None,
        *,
        batch_size: int = 1000,
        dtype: torch.dtype = torch.float32,
        progress: bool = False,
    ) -> Tensor:
        """Images `(count, channels, size, size)` in [-1, 1], by one pass of the decoder: no chain is run.

        Without a `seed`, latent vectors continue the numbering of those of training, with its seed: always the same
        images, from vectors that training has not seen. `dtype`, of the decoder, is float32 or bfloat16. `progress` is
        there for the sake of other runs: a pass shows no bar.
        """
        first = self.config.total_chains if seed is None else 0
        seed = self.config.seed if seed is None else seed
        return self.vae.sample(count, seed, first, batch_size=batch_size, dtype=dtype)


def new_vae(config: VAEConfig) -> VAE:
    """A VAE with weights drawn from the config's seed and torch's own generator left alone."""
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
    """The VAE of a checkpoint, ready for sampling: with averaged weights, or those trained last."""
    vae = new_vae(config).to(device)
    averaged = weights == "average" and config.ema
    vae.load_state_dict(part(checkpoint.tensors, "average." if averaged else "vae."))
    return vae.eval().requires_grad_(False)


def with_updated_bn(vae: VAE, config: VAEConfig, images: Tensor) -> VAE:
    """An independent copy for sampling, whose batch norms have its own statistics, on real `images` and the prior."""
    ready = copy.deepcopy(vae).eval().requires_grad_(False)
    ready.update_bn(images, batches=BN_UPDATE_BATCHES, batch_size=config.batch_size, seed=config.seed)
    return ready


def save_pictures(
    run: VAERun,
    trained: VAE,
    real: Tensor,
    reconstructions: Sequence[tuple[str, Tensor]],
    curves: pictures.Curves,
    folder: RunFolder,
    board: TensorBoardWriter,
) -> None:
    """samples.png, weights.png, reconstructions.png and curves.png; with `pictures_every` a grid in pictures/ too."""
    samples = run.sample(pictures.GRID**2)
    variants = weight_variants(run, trained)
    with folder.writing("pictures"):
        pictures.save_samples(folder.path / "samples.png", samples, real)
        pictures.save_panels(folder.path / "weights.png", variants)
        pictures.save_panels(folder.path / "reconstructions.png", [("real images", real), *reconstructions])
        pictures.save_curves(folder.path / "curves.png", folder.log.lines(), curves)
        if run.config.pictures_every:
            (folder.path / "pictures").mkdir(exist_ok=True)
            pictures.save_grid(folder.path / "pictures" / f"iteration-{run.iteration:09d}.png", samples)
        board.picture(f"samples/{run.size}", pictures.tile(samples, pictures.GRID), run.iteration)


def weight_variants(run: VAERun, trained: VAE, count: int = pictures.GRID**2) -> list[tuple[str, Tensor]]:
    """The first samples of `run` as its averaged weights and the `trained` ones give them, with running statistics,
    which those of the run were measured for, and with those of this batch: titles and images."""
    z = run.vae.prior(count, run.config.seed, run.config.total_chains)
    return [
        (f"{name} weights, {statistics} statistics", _decoded(vae, z, statistics == "batch"))
        for name, vae in (("trained", trained), ("averaged", run.vae))
        for statistics in ("running", "batch")
    ]


@torch.no_grad()
def _decoded(vae: VAE, z: Tensor, batch_statistics: bool) -> Tensor:
    """Images of latent vectors, with batch norm's statistics of training or of this batch; the net stays as it is."""
    return copy.deepcopy(vae).train(batch_statistics).decode(z)
