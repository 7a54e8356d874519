"""Translation: chains of an energy of the target domain that start at images of another one.

Zhao, Xie and Li, "Learning Energy-Based Generative Models via Coarse-to-Fine Expanding and Sampling", ICLR 2021:
neither a generator nor pairs nor a cycle loss, only the target's energy. Settings are those of the authors' code.

The energy of a run that was trained coarse to fine knows little but the way from enlarged samples of the level below to
sharp ones, so that chains of its highest level alone change details at most. With `start_size` they start lower, from
the source averaged down, and go up through the levels; a data_weight to the source then keeps what is where.
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
from fastebm.sampling import Langevin
from fastebm.tasks.climb import Climb, climb, energies_of
from fastebm.tasks.energies import Model, levels_from, top_gradient
from fastebm.tasks.inputs import checked_images


@dataclass(frozen=True)
class TranslateOptions:
    """How chains translate.

    Attributes:
        num_steps: updates.
        step_size: of each.
        noise_std: of the chains.
        start_noise: standard deviation of the noise that the source images get.
        snapshots: images that are kept of the way, after the start, at about equal distances.
        start_size: the resolution at which chains start, from the source averaged down, with `num_steps` at each level.
            What is finer comes from the energy. None is full size. A lower one needs a run of variant "cascade", and
            the snapshots are then the ends of the levels, enlarged.
        data_weight: weight of a data_weight to the source (averaged down) in the gradient, at each level; 0 for none.
    """

    num_steps: int = 50
    step_size: float = 1.0
    noise_std: float = 0.0
    start_noise: float = 0.01
    snapshots: int = 6
    start_size: int | None = None
    data_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.snapshots <= self.num_steps:
            raise ValueError(f"snapshots must be from 1 to the {self.num_steps} steps, got {self.snapshots}")
        if not self.start_noise >= 0:
            raise ValueError(f"start_noise must not be negative, got {self.start_noise}")
        if not 0 <= self.data_weight <= 1 / self.step_size:
            raise ValueError(
                f"data_weight must be from 0 to 1 / step_size = {1 / self.step_size:g}, at which a step begins anew from the "
                f"source, got {self.data_weight}"
            )


@dataclass(frozen=True, eq=False)
class TranslationResult:
    """Source images and what became of them.

    Attributes:
        source: (N, C, H, W).
        snapshot_steps: the updates after which `snapshots` were taken.
        snapshots: (T, N, C, H, W), in [-1, 1]; the first one is the start, the last one the end.
        energy: (T, N), of the snapshots.
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
        """How much each pixel was changed: the mean over colours of abs(end - source), (N, H, W), in [0, 2]."""
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
    """Carries images over into the domain that `model` has learned.

    Args:
        model: an energy of the target domain, or a run, of which the highest level serves.
        source: float32 (N, C, H, W) in [-1, 1], of another domain.
        options: by default the authors': 50 steps of size 1 without noise, from images with noise of 0.01.
        seed: of all noise; image i has chain i.
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
    source = checked_images("source images", source, model)
    gradient = top_gradient(model)
    way = _at_full_size if options.start_size is None else _up_from
    taken, snapshots = way(model, source, options, seed, batch_size)
    frames = torch.stack(snapshots).clamp(-1, 1)
    energy = torch.stack([energies_of(gradient, frame, batch_size) for frame in frames])
    return TranslationResult(options, source, tuple(taken), frames, energy)


def _at_full_size(
    model: Model, source: Tensor, options: TranslateOptions, seed: int, batch_size: int | None
) -> tuple[list[int], list[Tensor]]:
    """The steps after which snapshots were taken, and these."""
    sampler = Langevin(top_gradient(model), options.step_size, options.noise_std)
    data_term = (source, options.data_weight) if options.data_weight else None
    x = _noisy(source, options, seed)
    taken = torch.linspace(0, options.num_steps, options.snapshots + 1).round().int().tolist()
    snapshots = [x]
    for before, after in itertools.pairwise(taken):
        x = sampler.sample(x, after - before, seed, start_step=before, data_term=data_term, batch_size=batch_size)
        snapshots.append(x)
    return taken, snapshots


def _up_from(
    model: Model, source: Tensor, options: TranslateOptions, seed: int, batch_size: int | None
) -> tuple[list[int], list[Tensor]]:
    """The same through the levels from `start_size` on; snapshots are the start and the ends of levels, enlarged."""
    assert options.start_size is not None
    levels = levels_from(model, options.start_size)
    sources = {level: F.avg_pool2d(source, source.shape[3] // level) for level in levels}
    start = _noisy(sources[options.start_size], options, seed)
    how = Climb(options.num_steps, options.step_size, options.noise_std, options.noise_std)
    pulled = (
        {level: (target, options.data_weight) for level, target in sources.items()} if options.data_weight else None
    )
    ends = climb(levels, start, how, seed=seed, pulled=pulled, batch_size=batch_size)
    snapshots = [F.interpolate(x, source.shape[2:], mode="nearest") for x in (start, *ends.values())]
    return [place * options.num_steps for place in range(len(snapshots))], snapshots


def _noisy(x: Tensor, options: TranslateOptions, seed: int) -> Tensor:
    return x + options.start_noise * normal(x.shape, seed=seed, stream=Stream.INITIAL, device=x.device)
