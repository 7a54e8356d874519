"""`CoarseToFineRun`: a coarse-to-fine run, loaded from its folder for sampling, and its pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastebm import plotting
from fastebm.models import CoarseToFineEnergy
from fastebm.runs.checkpoints import Checkpoint, Layout
from fastebm.runs.folder import RunFolder
from fastebm.runs.nets import outline, with_weights
from fastebm.runs.run import Run, trained_checkpoint
from fastebm.sampling import Cascade, ExpandingCascade, linear, piecewise_constant
from fastebm.sampling.cascade import LevelSampler
from fastebm.training.coarse_to_fine.config import CoarseToFineConfig, Stage
from fastebm.training.pictures import save_run_pictures
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.weights import checkpoint_layout, fork_rng, select_prefix

Levels = Mapping[int, Callable[[Tensor], Tensor]]


@dataclass(frozen=True, repr=False)
class CoarseToFineRun(Run):
    """A coarse-to-fine run: an energy for each resolution that it has reached.

    Attributes:
        levels: energies `(B, channels, s, s) -> (B,)` by size s, low meaning real. That of a stage in progress is a
            `functools.partial` with its `beta` where that is below 1.

    Example:
        >>> import dataclasses, tempfile, torch, fastebm
        >>> config = dataclasses.replace(fastebm.training.DIGITS, iterations=(1, 1), batch_sizes=(4, 4), num_steps=2)
        >>> run = fastebm.train(config, torch.zeros(9, 1, 8, 8), tempfile.mkdtemp() + "/run", progress=False)
        >>> sorted(run.levels), run.energy(run.sample(5, seed=1)).shape
        ([4, 8], torch.Size([5]))
    """

    config: CoarseToFineConfig
    levels: dict[int, Callable[[Tensor], Tensor]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "energy", self.levels[self.size])

    @property
    def size(self) -> int:
        return max(self.levels)

    def cascade(self) -> LevelSampler:
        """The sampler with the run's own settings: a `Cascade`, or for the expanding variant an `ExpandingCascade`."""
        if self.config.variant == "cascade":
            return cascade(self.config, self.levels)
        top = self.levels[self.size]
        net, beta = (top.func, top.keywords["beta"]) if isinstance(top, functools.partial) else (top, 1.0)
        return expanding_cascade(self.config, cast(nn.Module, net), self.size, beta)

    def sample(self, count: int, seed: int | None = None, *, batch_size: int = 1000, progress: bool = False) -> Tensor:
        """Images by chains through all levels; arguments as of `Run.sample`."""
        options: dict[str, Any] = {"channels": self.config.channels, "batch_size": batch_size, "progress": progress}
        return self.cascade().sample(count, *self._key(seed), **options).clamp(-1, 1)

    @classmethod
    def load(
        cls, run_dir: str | Path, device: torch.device | str | None = None, *, iteration: int | None = None
    ) -> CoarseToFineRun:
        """The run in a folder, from its newest good checkpoint or from that of `iteration`.

        Raises RunError where there is no such run, it has no checkpoint yet, or not the one of `iteration`.
        """
        config, checkpoint = trained_checkpoint(run_dir, cls, CoarseToFineConfig, iteration)
        weights = select_prefix(checkpoint.tensors, "average." if config.ema else "net.")
        net = with_weights(outline(lambda: new_net(config)), weights, device)
        frozen = frozen_levels(net, checkpoint)
        levels = reached_levels(config, checkpoint.iteration, frozen, net)
        return cls(Path(run_dir), config, checkpoint.iteration, levels)

    @staticmethod
    def layout(config: CoarseToFineConfig, iteration: int) -> Layout:
        net = outline(lambda: new_net(config))
        nets = {"net.": net} | ({"average.": net} if config.ema else {})
        for stage in config.stages:
            if stage.first_iteration + stage.iterations <= iteration:
                nets[f"frozen.{stage.size}."] = net.frozen(stage.size)
        stage = config.stage_at(iteration)
        found = checkpoint_layout(nets, {"optimizer.": net.parameters_at(stage.size)})
        if not within(stage, iteration) or not (kept := config.chains_by_start(stage).continued):
            return found
        ends = torch.empty((kept, config.channels, stage.size, stage.size), device="meta")
        return Layout(dict(found.tensors) | {"continued": ends}, found.groups)


def within(stage: Stage, iteration: int) -> bool:
    """Whether a stage has begun, and has not ended, after `iteration` updates of the run."""
    return stage.first_iteration < iteration < stage.first_iteration + stage.iterations


def reached_levels(
    config: CoarseToFineConfig, iteration: int, frozen: Mapping[int, CoarseToFineEnergy], net: CoarseToFineEnergy
) -> dict[int, Callable[[Tensor], Tensor]]:
    """The energies after `iteration` updates: those of ended stages, and a copy of `net` for a stage in progress."""
    levels: dict[int, Callable[[Tensor], Tensor]] = dict(frozen)
    stage = config.stage_at(iteration)
    if within(stage, iteration):
        top, beta = net.frozen(stage.size), config.beta_at(iteration)
        levels[stage.size] = top if beta == 1 else functools.partial(top, beta=beta)
    return levels


def cascade(config: CoarseToFineConfig, levels: Levels) -> Cascade:
    """The sampler of the "cascade" variant through `levels`."""
    options = _chain_options(config)
    if config.step_growth != 1:
        options["step_size"] = piecewise_constant(*(config.step_size_at(size) for size in sorted(levels)))
    return Cascade(levels, **options)


def expanding_cascade(config: CoarseToFineConfig, net: nn.Module, size: int, beta: float = 1.0) -> ExpandingCascade:
    """The sampler of the "expanding" variant at `size`; its chains at half of that run through `net` as well."""
    return ExpandingCascade(net, size=size, beta=beta, **_chain_options(config))


def _chain_options(config: CoarseToFineConfig) -> dict[str, Any]:
    return {
        "num_steps": config.num_steps,
        "step_size": config.step_size,
        "noise_std": linear(config.noise_start, config.noise_end),
        "dtype": getattr(torch, config.dtype),
        "engine": config.engine,
        "step_shrink": config.step_shrink,
        "grad_norm_clip": config.chain_clip or None,
    }


def new_net(config: CoarseToFineConfig) -> CoarseToFineEnergy:
    """A net for all stages, with weights drawn from the config's seed."""
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
        if state := select_prefix(checkpoint.tensors, f"frozen.{size}."):
            frozen[size] = net.frozen(size)
            frozen[size].load_state_dict(state)
    return frozen


def save_pictures(run: CoarseToFineRun, real: Tensor, folder: RunFolder, board: TensorBoardWriter) -> None:
    """The pictures of every method, and strip.png with chains from noise to their ends."""
    # Up to 32x32 all samples in one batch, above that batches of as many pixels.
    batch_size = max(1, plotting.GRID**2 * 32**2 // max(32, run.size) ** 2)
    samples = run.sample(plotting.GRID**2, batch_size=batch_size)
    snapshots: list[Tensor] = []

    def keep(k: int, x: Tensor, info: Any) -> None:
        if k == 1:
            snapshots.append(info.before.cpu())
        snapshots.append(x.cpu())

    config = run.config
    run.cascade().sample(plotting.STRIP_ROWS, config.seed, config.total_chains, channels=config.channels, keep=keep)
    save_run_pictures(run, samples, real, folder, board)
    with folder.writing("pictures"):
        plotting.save_strip(folder.path / "strip.png", snapshots)
