"""Translation: Langevin chains of an energy of the target domain that start at images of a source domain.

The method of Zhao, Xie and Li, "Learning Energy-Based Generative Models via Coarse-to-Fine Expanding and Sampling",
ICLR 2021, which needs no generator, no pairs of images and no cycle loss. Settings are those of the authors' code.

The highest level of a coarse-to-fine run has learned only to sharpen enlarged samples of the level below, so that its
chains alone change little but details. With `start_size`, chains start at a lower level, from the source averaged
down; a data term (`data_weight`) then keeps the composition of the source.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.ops import normal
from fastebm.rng import Stream
from fastebm.sampling import Cascade, Langevin
from fastebm.tasks.arguments import (
    MAX_STEPS,
    check_batch_size,
    check_memory,
    check_number,
    check_seed,
    check_whole,
    settle,
)
from fastebm.tasks.inputs import Model, TaskEnergy, open_energy


@dataclass(frozen=True)
class TranslateOptions:
    """The settings of translation.

    Attributes:
        num_steps: the number of updates; with `start_size`, at each level.
        step_size: the step size of the updates; that of a run's training is `run.config.step_size`.
        noise_std: the noise of the updates.
        start_noise: the standard deviation of the noise that is added to the source images.
        snapshots: the number of states that are kept, after the start, at about equal distances.
        start_size: the resolution at which chains start, from the source averaged down. None is full size. Others need
            a run of variant "cascade", and the snapshots are then the ends of the levels, enlarged.
        data_weight: the weight of the data term, which pulls to the source (averaged down) at each level; 0 for none.

    Raises ValueError or TypeError for numbers out of range.
    """

    num_steps: int = 50
    step_size: float = 1.0
    noise_std: float = 0.0
    start_noise: float = 0.01
    snapshots: int = 6
    start_size: int | None = None
    data_weight: float = 0.0

    def __post_init__(self) -> None:
        settle(self, num_steps=check_whole("num_steps", self.num_steps, most=MAX_STEPS))
        settle(self, step_size=check_number("step_size", self.step_size, above=0))
        settle(self, noise_std=check_number("noise_std", self.noise_std, 0))
        settle(
            self,
            snapshots=check_whole("snapshots", self.snapshots),
            data_weight=check_number("data_weight", self.data_weight, 0),
        )
        if self.snapshots > self.num_steps:
            raise ValueError(f"snapshots must be from 1 to the {self.num_steps} steps, got {self.snapshots}")
        settle(self, start_noise=check_number("start_noise", self.start_noise, 0))
        if self.start_size is not None:
            settle(self, start_size=check_whole("start_size", self.start_size))
        if self.data_weight > 1 / self.step_size:
            raise ValueError(
                f"data_weight must be from 0 to 1 / step_size = {1 / self.step_size:g}, at which every step starts at "
                f"the source again, got {self.data_weight}"
            )


@dataclass(frozen=True, eq=False)
class TranslationResult:
    """Source images and their translations.

    Attributes:
        source: (N, C, H, W).
        snapshot_steps: the numbers of updates after which `snapshots` were taken.
        snapshots: (T, N, C, H, W), in [-1, 1]; the first one is the start, the last one the end.
        energy: the energies (T, N) of the snapshots.
    """

    options: TranslateOptions
    source: Tensor
    snapshot_steps: tuple[int, ...]
    snapshots: Tensor
    energy: Tensor

    @property
    def images(self) -> Tensor:
        """The translated images (N, C, H, W)."""
        return self.snapshots[-1]

    @property
    def change(self) -> Tensor:
        """The change of each pixel: the mean over colours of abs(end - source), (N, H, W), in [0, 2]."""
        return (self.images - self.source).abs().mean(1)

    def to_json(self) -> dict[str, Any]:
        return {
            "images": len(self.source),
            "options": dataclasses.asdict(self.options),
            "snapshot_steps": list(self.snapshot_steps),
            "energy": [float(energies.mean()) for energies in self.energy],
            "change": float(self.change.mean()),
        }


@torch.no_grad()
def translate(
    model: Model,
    source: Tensor,
    options: TranslateOptions | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = 256,
) -> TranslationResult:
    """Translates images into the domain that `model` has learned.

    Args:
        model: a run, the folder of one, or an energy of images, trained on the target domain. Of a coarse-to-fine run,
            chains use the highest level, and the levels from `options.start_size` up.
        source: float32 (N, C, H, W) in [-1, 1], of another domain. Images in [0, 1] can't be told from these:
            `2 * images - 1` converts them.
        options: by default those of the authors: 50 steps of size 1 without noise, from images with noise of 0.01.
        seed: of all noise; image i has the chain id i.
        batch_size: chains at a time; the result does not depend on it.

    Raises ValueError or TypeError for images that don't fit, FloatingPointError where energies are not finite.

    Example:
        >>> import torch
        >>> from fastebm.tasks import translate
        >>> def energy(x):  # of dark images
        ...     return 0.05 * (x + 0.9).square().sum((1, 2, 3))
        >>> translate(energy, torch.full((2, 1, 8, 8), 0.5)).images.mean().item() < -0.8
        True
    """
    options = TranslateOptions() if options is None else options
    check_seed(seed)
    check_batch_size(batch_size)
    energy = open_energy(model)
    source = energy.check_images("source images", source)
    check_memory(f"{options.snapshots:,} snapshots of each image", source.numel() * options.snapshots, source.device)
    run_chains = _at_full_size if options.start_size is None else _from_level
    taken, snapshots = run_chains(energy, source, options, seed, batch_size)
    frames = torch.stack(snapshots).clamp(-1, 1)
    energies = torch.stack([energy.energies(frame, batch_size) for frame in frames])
    return TranslationResult(options, source, tuple(taken), frames, energies)


def _at_full_size(
    energy: TaskEnergy, source: Tensor, options: TranslateOptions, seed: int, batch_size: int | None
) -> tuple[list[int], list[Tensor]]:
    """The steps after which snapshots were taken, and the snapshots."""
    sampler = Langevin(energy.gradient, options.step_size, options.noise_std)
    data_term = (source, options.data_weight) if options.data_weight else None
    x = _add_start_noise(source, options, seed)
    taken = torch.linspace(0, options.num_steps, options.snapshots + 1, device="cpu").round().int().tolist()
    snapshots = [x]
    for before, after in itertools.pairwise(taken):
        x = sampler.sample(x, after - before, seed, start_step=before, data_term=data_term, batch_size=batch_size)
        snapshots.append(x)
    return taken, snapshots


def _from_level(
    energy: TaskEnergy, source: Tensor, options: TranslateOptions, seed: int, batch_size: int | None
) -> tuple[list[int], list[Tensor]]:
    """The same through the levels from `start_size` on; snapshots are the start and the ends of levels, enlarged."""
    levels = energy.levels_from(options.start_size, source.shape[3])
    sources = {level: F.avg_pool2d(source, source.shape[3] // level) for level in levels}
    start = _add_start_noise(sources[min(levels)], options, seed)
    growths = energy.growths(levels)
    data_term = {level: (target, options.data_weight / growths[level]) for level, target in sources.items()}
    step_size = energy.step_sizes(levels, options.step_size)
    cascade = Cascade(levels, num_steps=options.num_steps, step_size=step_size, noise_std=options.noise_std)
    ends = cascade.sample_levels(
        None, seed, x0=start, data_term=data_term if options.data_weight else None, batch_size=batch_size
    )
    snapshots = [F.interpolate(x, source.shape[2:], mode="nearest") for x in (start, *ends.values())]
    return [place * options.num_steps for place in range(len(snapshots))], snapshots


def _add_start_noise(x: Tensor, options: TranslateOptions, seed: int) -> Tensor:
    return x + options.start_noise * normal(x.shape, seed=seed, stream=Stream.INITIAL, device=x.device)
