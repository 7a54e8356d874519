"""What a coarse-to-fine run has learned so far, read from its folder for sampling, and its pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastebm import plotting as pictures
from fastebm.models import CoarseToFineEnergy
from fastebm.runs.checkpoints import Checkpoint
from fastebm.runs.folder import RunFolder
from fastebm.sampling import Cascade, ExpandingCascade, linear
from fastebm.sampling.cascade import LevelSampler
from fastebm.training.coarse_to_fine.config import CoarseToFineConfig
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.initial_weights import fork_rng
from fastebm.training.trainer.loop import part, trained_checkpoint

Levels = Mapping[int, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class CoarseToFineRun:
    """What a run has learned up to `iteration`: an energy for each resolution that it reached.

    Attributes:
        path: the run's folder.
        levels: energies `(B, channels, s, s) -> (B,)` by size s, low meaning real. That of a stage which has not ended
            is a `functools.partial` with its `beta` where that is below 1.
    """

    path: Path
    config: CoarseToFineConfig
    iteration: int
    levels: dict[int, Callable[[Tensor], Tensor]]

    @property
    def finished(self) -> bool:
        return self.iteration == self.config.total_iterations

    @property
    def size(self) -> int:
        """The highest resolution so far."""
        return max(self.levels)

    def cascade(self) -> LevelSampler:
        """The sampler with the run's own settings: a `Cascade`, or for the expanding variant an `ExpandingCascade`."""
        if self.config.variant == "cascade":
            return cascade(self.config, self.levels)
        top = self.levels[self.size]
        net, beta = (top.func, top.keywords["beta"]) if isinstance(top, functools.partial) else (top, 1.0)
        return expanding_cascade(self.config, cast(nn.Module, net), self.size, beta)

    def sample(self, count: int, seed: int | None = None, *, batch_size: int = 1000, progress: bool = False) -> Tensor:
        """Images `(count, channels, size, size)` in [-1, 1].

        Without a `seed`, chains continue the numbering of those of training, with its seed: always the same images,
        from noise that training has not seen.
        """
        images = self.cascade().sample(
            count,
            self.config.seed if seed is None else seed,
            self.config.total_chains if seed is None else 0,
            channels=self.config.channels,
            batch_size=batch_size,
            progress=progress,
        )
        return images.clamp(-1, 1)

    @classmethod
    def load(
        cls, run_dir: str | Path, device: torch.device | str | None = None, *, iteration: int | None = None
    ) -> CoarseToFineRun:
        """Loads the run in a folder, finished or not, from its newest good checkpoint or from that of `iteration`.

        Raises RunError where there is no such run, it has no checkpoint yet, or not the one of `iteration`.
        """
        config, checkpoint = trained_checkpoint(run_dir, CoarseToFineConfig, iteration)
        net = new_net(config).to(device)
        frozen = frozen_levels(net, checkpoint)
        net.load_state_dict(part(checkpoint.tensors, "average." if config.ema else "net."))
        levels = reached_levels(config, checkpoint.iteration, frozen, net)
        return cls(Path(run_dir), config, checkpoint.iteration, levels)


def reached_levels(
    config: CoarseToFineConfig, iteration: int, frozen: Mapping[int, CoarseToFineEnergy], net: CoarseToFineEnergy
) -> dict[int, Callable[[Tensor], Tensor]]:
    """The energies after `iteration` updates: of ended stages, and a copy from `net` of one that has begun."""
    levels: dict[int, Callable[[Tensor], Tensor]] = dict(frozen)
    stage = config.stage_at(iteration)
    if stage.first_iteration < iteration < stage.first_iteration + stage.iterations:
        top, beta = net.frozen(stage.size), config.beta_at(iteration)
        levels[stage.size] = top if beta == 1 else functools.partial(top, beta=beta)
    return levels


def cascade(config: CoarseToFineConfig, levels: Levels) -> Cascade:
    """The sampler of the "cascade" variant through `levels`."""
    return Cascade(levels, **_chain_options(config))


def expanding_cascade(config: CoarseToFineConfig, net: nn.Module, size: int, beta: float = 1.0) -> ExpandingCascade:
    """The sampler of the "expanding" variant at `size`. Its chains at half of that run through `net` as well."""
    return ExpandingCascade(net, size=size, beta=beta, **_chain_options(config))


def _chain_options(config: CoarseToFineConfig) -> dict[str, Any]:
    return {
        "num_steps": config.num_steps,
        "step_size": config.step_size,
        "noise_std": linear(config.noise_start, config.noise_end),
        "dtype": getattr(torch, config.dtype),
        "engine": config.engine,
    }


def new_net(config: CoarseToFineConfig) -> CoarseToFineEnergy:
    """A net for all stages, with weights drawn from the config's seed and torch's own generator left alone."""
    with fork_rng(config.seed):
        return CoarseToFineEnergy(
            config.sizes[-1],
            config.channels,
            base_width=config.base_width,
            lowest=config.sizes[0],
            activation=config.activation,
            spectral_norm=config.spectral_norm,
        )


def frozen_levels(net: CoarseToFineEnergy, checkpoint: Checkpoint) -> dict[int, CoarseToFineEnergy]:
    """The nets of ended stages, by size, from a checkpoint."""
    frozen = {}
    for size in net.sizes:
        if state := part(checkpoint.tensors, f"frozen.{size}."):
            frozen[size] = net.frozen(size)
            frozen[size].load_state_dict(state)
    return frozen


def save_pictures(run: CoarseToFineRun, real: Tensor, folder: RunFolder, board: TensorBoardWriter) -> None:
    """samples.png, strip.png and curves.png of the run so far; with `pictures_every` also a grid in pictures/."""
    # Up to 32x32 all samples in one batch, above that batches of as many pixels.
    batch_size = max(1, pictures.GRID**2 * 32**2 // max(32, run.size) ** 2)
    samples = run.sample(pictures.GRID**2, batch_size=batch_size)
    moments: list[Tensor] = []

    def keep(k: int, x: Tensor, info: Any) -> None:
        if k == 1:
            moments.append(info.before.cpu())
        moments.append(x.cpu())

    config = run.config
    run.cascade().sample(pictures.STRIP_ROWS, config.seed, config.total_chains, channels=config.channels, keep=keep)
    with folder.writing("pictures"):
        pictures.save_samples(folder.path / "samples.png", samples, real)
        pictures.save_strip(folder.path / "strip.png", moments)
        pictures.save_curves(folder.path / "curves.png", folder.log.lines())
        if config.pictures_every:
            (folder.path / "pictures").mkdir(exist_ok=True)
            pictures.save_grid(folder.path / "pictures" / f"iteration-{run.iteration:09d}.png", samples)
        board.picture(f"samples/{run.size}", pictures.tile(samples, pictures.GRID), run.iteration)
