"""What an EC-VAE run has learned so far, read from its folder for sampling, and its pictures."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastebm.models import MultiScaleEnergy, Vae
from fastebm.training import pictures
from fastebm.training.board import Board
from fastebm.training.ec_vae_config import EcVaeConfig
from fastebm.training.loop import checkpoint_of, part
from fastebm.training.run import RunError, RunFolder

KIND = "ec_vae"
SETTLING_BATCHES = 16

CURVES: pictures.Curves = (
    ("squared error of an image", {"squared_error": "reconstruction"}),
    ("nats", {"kl": "KL to the prior"}),
    ("squared distance", {"calibration": "chain from its start", "noise_floor": "of noise alone"}),
    ("λ", {"lambda": "weight of the calibration"}),
    ("mean energy (low: real)", {"energy_data": "data", "energy_samples": "chain ends"}),
    ("gradient norm", {"gradient_norm": "energy", "gradient_norm_decoder": "decoder"}),
)


@dataclass(frozen=True)
class EcVaeRun:
    """What a run has learned up to `iteration`.

    Attributes:
        path: the run's folder.
        vae: in eval mode, its parameters without gradients.
        energy: E(x), low meaning real, likewise; None where the run trains a plain VAE.
    """

    path: Path
    config: EcVaeConfig
    iteration: int
    vae: Vae
    energy: MultiScaleEnergy | None

    @property
    def finished(self) -> bool:
        return self.iteration == self.config.total_iterations

    @property
    def size(self) -> int:
        """The resolution of samples."""
        return self.config.size

    def sample(self, count: int, seed: int | None = None, *, batch_size: int = 1000, progress: bool = False) -> Tensor:
        """Images `(count, channels, size, size)` in [-1, 1], by one pass of the decoder: no chain is run.

        Without a `seed`, latent vectors continue the numbering of those of training, with its seed: always the same
        images, from vectors that training has not seen. `progress` is there for the sake of other runs: a pass shows
        no bar.
        """
        first = self.config.total_chains if seed is None else 0
        return self.vae.sample(count, self.config.seed if seed is None else seed, first, batch_size=batch_size)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Decoded posterior means of images (B, channels, size, size) in [-1, 1]."""
        return self.vae.decode(self.vae.encode(images)[0])


def load_ec_vae(
    run_dir: str | Path, device: torch.device | str | None = None, *, weights: Literal["average", "trained"] = "average"
) -> EcVaeRun:
    """The run in a folder, finished or not, as its newest good checkpoint has it, for sampling.

    Args:
        weights: "average" has the averaged ones (the trained ones where the run averages none), with batch norm's
            statistics measured anew for them; "trained" the last ones, with the statistics of training.

    Raises RunError where there is no such run or it has no checkpoint yet.
    """
    folder = RunFolder.existing(run_dir)
    config = EcVaeConfig.from_json(folder.config(KIND))
    checkpoint = checkpoint_of(folder, config.checkpoint_every)
    if not checkpoint.iteration:
        raise RunError(f"{run_dir} has no trained net yet: its newest checkpoint is of iteration 0")
    vae, energy = new_vae(config).to(device), new_energy(config)
    averaged = weights == "average" and config.ema
    vae.load_state_dict(part(checkpoint.tensors, "average." if averaged else "vae."))
    if energy is not None:
        energy.to(device).load_state_dict(part(checkpoint.tensors, "energy."))
        energy.eval().requires_grad_(False)
    return EcVaeRun(Path(run_dir), config, checkpoint.iteration, vae.eval().requires_grad_(False), energy)


def new_vae(config: EcVaeConfig) -> Vae:
    """A VAE with weights drawn from the config's seed and torch's own generator left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return Vae(
            config.size,
            config.channels,
            latent=config.latent,
            width=config.width,
            max_width=config.max_width,
            variance=config.kl_weight / 2,
            learned_variance=config.learned_variance,
            spectral_norm=config.spectral_norm,
        )


def new_energy(config: EcVaeConfig) -> MultiScaleEnergy | None:
    """The energy, likewise from the seed; None for a plain VAE."""
    if not config.calibrated:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return MultiScaleEnergy(
            config.size,
            config.channels,
            width=config.energy_width,
            depth=config.energy_depth,
            spectral_norm=config.spectral_norm,
        )


def settled(vae: Vae, config: EcVaeConfig, images: Tensor) -> Vae:
    """An independent copy for sampling, whose batch norms have its own statistics, on real `images` and the prior."""
    ready = copy.deepcopy(vae).eval().requires_grad_(False)
    ready.settle_batch_norms(images, batches=SETTLING_BATCHES, batch_size=config.batch_size, seed=config.seed)
    return ready


def save_pictures(run: EcVaeRun, trained: Vae, averaged: Vae, real: Tensor, folder: RunFolder, board: Board) -> None:
    """samples.png, weights.png, reconstructions.png and curves.png; with `pictures_every` a grid in pictures/ too."""
    samples = run.sample(pictures.GRID**2)
    z = run.vae.prior(pictures.GRID**2, run.config.seed, run.config.total_chains)
    variants = [
        (f"{name} weights, {statistics} statistics", _decoded(vae, z, statistics == "batch"))
        for name, vae in (("trained", trained), ("averaged", averaged))
        for statistics in ("running", "batch")
    ]
    reconstructions = run.reconstruct(real.to(z.device))
    with folder.writing("pictures"):
        pictures.save_samples(folder.path / "samples.png", samples, real)
        pictures.save_panels(folder.path / "weights.png", variants)
        pictures.save_panels(
            folder.path / "reconstructions.png", [("real images", real), ("reconstructions", reconstructions)]
        )
        pictures.save_curves(folder.path / "curves.png", folder.log.lines(), CURVES)
        if run.config.pictures_every:
            (folder.path / "pictures").mkdir(exist_ok=True)
            pictures.save_grid(folder.path / "pictures" / f"iteration-{run.iteration:09d}.png", samples)
        board.picture(f"samples/{run.size}", pictures.tile(samples, pictures.GRID), run.iteration)


@torch.no_grad()
def _decoded(vae: Vae, z: Tensor, batch_statistics: bool) -> Tensor:
    """Images of latent vectors, with batch norm's statistics of training or of this batch; the net stays as it is."""
    return copy.deepcopy(vae).train(batch_statistics).decode(z)
