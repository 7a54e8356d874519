"""Interpolation: between the starts of two chains, and between two images along a path of low energies."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.distributed import shared_rows
from fastebm.ops import uniform
from fastebm.progress import progress_bar
from fastebm.rng import Stream
from fastebm.sampling import Cascade, Langevin, linear
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
from fastebm.training import CoarseToFineRun


@dataclass(frozen=True, eq=False)
class ChainPath:
    """Samples whose starts lie between the starts of N pairs of chains, P points for each pair.

    Attributes:
        between: what was interpolated, "noise" or "coarse".
        starts: (N, P, C, s, s), the interpolated starts.
        images: (N, P, C, H, W), the ends of the chains, in [-1, 1].
        energy: the energies (N, P) of the ends.
    """

    between: Literal["noise", "coarse"]
    starts: Tensor
    images: Tensor
    energy: Tensor

    @property
    def largest_step(self) -> Tensor:
        """The largest distance between neighbours of each path, divided by the distance of its ends, (N,).

        It is 1 / (P - 1) for a straight path, and about 1 or more for one that jumps.
        """
        distances = (self.images[:, 1:] - self.images[:, :-1]).flatten(2).norm(dim=2)
        return distances.max(1).values / (self.images[:, -1] - self.images[:, 0]).flatten(1).norm(dim=1)

    def to_json(self) -> dict[str, Any]:
        return {
            "between": self.between,
            "pairs": len(self.images),
            "points": self.images.shape[1],
            "largest_step": float(self.largest_step.mean()),
            "energy_ends": float(self.energy[:, [0, -1]].mean()),
            "energy_between": float(self.energy[:, 1:-1].mean()),
        }


@torch.no_grad()
def interpolate_chains(
    run: CoarseToFineRun | str | Path,
    between: Literal["noise", "coarse"],
    *,
    pairs: int = 6,
    points: int = 9,
    seed: int = 0,
    batch_size: int | None = 256,
) -> ChainPath:
    """Samples of `run` whose starts lie between those of two chains.

    "noise" interpolates the noise at which chains start, as normal deviates on the quarter circle between both ends, so
    that every point is U(-1, 1) too. "coarse" interpolates the samples of the lowest level in a straight line, and goes
    on from there. All chains of a pair have the noise of its first chain, whose end is a sample of the run at `seed` in
    every bit.

    Args:
        run: a coarse-to-fine run of variant "cascade", or its folder.
        pairs, points: the numbers of pairs, and of points of a path with both ends, at least 3.
        seed: of the noise; pair i has the starts of the chain ids 2i and 2i + 1.
        batch_size: chains at a time; the result does not depend on it.

    Raises ValueError for another run, or numbers out of range; FloatingPointError where energies are not finite.
    """
    pairs, points = check_whole("pairs", pairs), check_whole("points", points, 3)
    if between not in ("noise", "coarse"):
        raise ValueError(f"between is 'noise' or 'coarse', got {between!r}")
    check_seed(seed)
    check_batch_size(batch_size)
    energy = open_energy(run)
    levels = energy.levels()
    assert isinstance(energy.run, CoarseToFineRun)
    lowest, size, config = min(levels), max(levels), energy.run.config
    if between == "coarse" and lowest == size:
        raise ValueError(f"{energy.run.path} has no level above {size}x{size} yet: interpolate between noise")
    check_memory(f"{pairs:,} paths of {points:,} points", pairs * points * config.channels * size**2, energy.device)
    cascade = Cascade(
        levels,
        num_steps=config.num_steps,
        step_size=energy.step_sizes(levels, energy.step_size),
        noise_std=linear(config.noise_start, config.noise_end),
    )
    shape = (2 * pairs, config.channels, lowest, lowest)
    ends = 2 * uniform(shape, seed=seed, stream=Stream.INITIAL, device=energy.device) - 1
    firsts = torch.arange(0, 2 * pairs, 2, device=ends.device)
    if between == "noise":
        starts = begin = _between_uniform(ends[::2], ends[1::2], points)
    else:
        both = firsts.repeat_interleave(2)
        low = cascade.sample_levels(None, seed, both, x0=ends, batch_size=batch_size)[lowest]
        starts = straight_path(low[::2], low[1::2], points)
        begin = starts.repeat_interleave(2, 3).repeat_interleave(2, 4).clamp(-1, 1)
    alike = firsts.repeat_interleave(points)
    images = cascade.sample(None, seed, alike, x0=begin.flatten(0, 1), batch_size=batch_size).clamp(-1, 1)
    energies = energy.energies(images, batch_size).unflatten(0, (pairs, points))
    return ChainPath(between, starts, images.unflatten(0, (pairs, points)), energies)


@dataclass(frozen=True)
class PathOptions:
    """The settings by which a path between images is relaxed.

    Attributes:
        points: the number of points of the path, with both ends.
        iterations: of one step down the energy at every inner point, and of redistributing the points.
        step_size: the size of these steps.

    Raises ValueError or TypeError for numbers out of range.
    """

    points: int = 11
    iterations: int = 60
    step_size: float = 0.25

    def __post_init__(self) -> None:
        settle(self, points=check_whole("points", self.points, 3))
        settle(self, iterations=check_whole("iterations", self.iterations, 0, MAX_STEPS))
        settle(self, step_size=check_number("step_size", self.step_size, above=0))


@dataclass(frozen=True, eq=False)
class ImagePath:
    """Paths between pairs of images: the straight one, and the one relaxed to lower energies.

    Attributes:
        straight, relaxed: (N, P, C, H, W), in [-1, 1]; both have the same ends.
        energy_straight, energy_relaxed: (N, P).
    """

    options: PathOptions
    straight: Tensor
    relaxed: Tensor
    energy_straight: Tensor
    energy_relaxed: Tensor

    def to_json(self) -> dict[str, Any]:
        highest = {"straight": self.energy_straight.max(1).values, "relaxed": self.energy_relaxed.max(1).values}
        return {
            "pairs": len(self.straight),
            "options": dataclasses.asdict(self.options),
            "energy_ends": float(self.energy_straight[:, [0, -1]].mean()),
            "highest_energy_straight": float(highest["straight"].mean()),
            "highest_energy_relaxed": float(highest["relaxed"].mean()),
            "paths_that_became_lower": int((highest["relaxed"] < highest["straight"]).sum()),
        }


@torch.no_grad()
def interpolate_images(
    model: Model,
    first: Tensor,
    second: Tensor,
    options: PathOptions | None = None,
    *,
    batch_size: int | None = 256,
    progress: bool = False,
) -> ImagePath:
    """Paths between images that avoid high energies, by the simplified string method.

    E, Ren, Vanden-Eijnden, "Simplified and improved string method for computing the minimum energy paths in
    barrier-crossing events", J. Chem. Phys. 126, 2007. It starts at the straight path. In each iteration, every inner
    point takes a step down the energy's gradient, and the points are then spaced equally along the path again. The ends
    stay. The result is the path of the iteration whose highest energy is lowest: long descents on an energy that was
    trained with short chains may end in minima that contain no images. Nothing here is random.

    Args:
        model: a run, the folder of one, or an energy of images; of a coarse-to-fine run, the highest level.
        first, second: the ends, float32 (N, C, H, W) in [-1, 1]. Images in [0, 1] can't be told from these:
            `2 * images - 1` converts them.
        options: by default 60 iterations of 11 points.
        batch_size: images at a time; the result does not depend on it.
        progress: shows a bar.

    Raises ValueError or TypeError for images that don't fit, FloatingPointError where energies are not finite.

    Example:
        >>> import torch
        >>> from fastebm.tasks import interpolate_images
        >>> def energy(x):  # of a ring around the origin
        ...     return (x.square().sum((1, 2, 3)) - 1).square()
        >>> ends = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2), torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
        >>> path = interpolate_images(energy, *ends)
        >>> round(path.energy_straight.max().item(), 2), round(path.energy_relaxed.max().item(), 2)
        (0.25, 0.0)
    """
    options = PathOptions() if options is None else options
    check_batch_size(batch_size)
    energy = open_energy(model)
    first = energy.check_images("first images", first)
    second = energy.check_images("second images", second)
    if first.shape != second.shape:
        raise ValueError(f"the ends of paths differ in shape: {tuple(first.shape)}, {tuple(second.shape)}")
    check_memory(f"{len(first):,} paths of {options.points:,} points", first.numel() * options.points, first.device)
    straight = straight_path(first, second, options.points)

    def relaxed(rows: range) -> tuple[Tensor, Tensor, Tensor]:
        return _relaxed(energy, straight[rows.start : rows.stop], options, batch_size, progress)

    best, energy_straight, best_energy = shared_rows(len(straight), relaxed)
    return ImagePath(options, straight, best, energy_straight, best_energy)


def _relaxed(
    energy: TaskEnergy, straight: Tensor, options: PathOptions, batch_size: int | None, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The relaxed paths, and the energies of the straight ones and of these."""
    first, second = straight[:, 0], straight[:, -1]
    best = path = straight
    best_energy = energy_straight = energy.energies(path.flatten(0, 1), batch_size).unflatten(0, path.shape[:2])
    sampler = Langevin(energy.gradient, options.step_size, 0.0, clamp=(-1, 1))
    with energy.gradient.chain(), progress_bar(options.iterations, "paths", "iteration", shown=progress) as bar:
        for _ in range(options.iterations):
            inner = path[:, 1:-1].flatten(0, 1)
            inner = sampler.sample(inner, 1, seed=0, batch_size=batch_size).unflatten(0, (len(path), -1))
            path = _redistribute(torch.cat((first[:, None], inner, second[:, None]), 1))
            energies = energy.energies(path.flatten(0, 1), batch_size).unflatten(0, path.shape[:2])
            lower = energies.max(1).values < best_energy.max(1).values
            best = torch.where(lower[:, None, None, None, None], path, best)
            best_energy = torch.where(lower[:, None], energies, best_energy)
            bar.update(1)
    return best, energy_straight, best_energy


def straight_path(first: Tensor, second: Tensor, points: int) -> Tensor:
    """A straight path (N, points, ...) from `first` to `second` (N, ...), which are its ends in every bit."""
    t = torch.linspace(0, 1, points, device=first.device).reshape(points, *[1] * (first.dim() - 1))
    path = (1 - t) * first[:, None] + t * second[:, None]
    return torch.cat((first[:, None], path[:, 1:-1], second[:, None]), 1)


def _between_uniform(first: Tensor, second: Tensor, points: int) -> Tensor:
    """A path (N, points, ...) between U(-1, 1) deviates, which is U(-1, 1) at every point and keeps the ends."""
    bound = 1 - 2.0**-24  # a uniform deviate may be 1, to which no finite normal deviate corresponds
    normal = [torch.erfinv(end.clamp(-bound, bound)) for end in (first, second)]
    angles = torch.linspace(0, math.pi / 2, points, device=first.device).reshape(points, *[1] * (first.dim() - 1))
    path = torch.erf(angles.cos() * normal[0][:, None] + angles.sin() * normal[1][:, None])
    return torch.cat((first[:, None], path[:, 1:-1], second[:, None]), 1)


def _redistribute(path: Tensor) -> Tensor:
    """Points at equal distances along the polyline through `path` (N, P, ...), with the same ends."""
    flat = path.flatten(2)
    count, points, _ = flat.shape
    lengths = (flat[:, 1:] - flat[:, :-1]).norm(dim=2)
    along = F.pad(lengths.cumsum(1), (1, 0))
    wanted = along[:, -1:] * torch.linspace(0, 1, points, device=path.device)
    segment = (torch.searchsorted(along, wanted, right=True) - 1).clamp(0, points - 2)
    share = (wanted - along.gather(1, segment)) / lengths.gather(1, segment).clamp(min=1e-12)
    rows = torch.arange(count, device=path.device)[:, None]
    new = torch.lerp(flat[rows, segment], flat[rows, segment + 1], share.clamp(0, 1)[:, :, None])
    return torch.cat((path[:, :1], new[:, 1:-1].reshape(path[:, 1:-1].shape), path[:, -1:]), 1)
