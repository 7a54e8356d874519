"""Inpainting: chains fill in a hole, while what is known is pinned inside of the kernel after every step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.data import neighbour_mean
from fastebm.data.masks import HOLE_NOISE
from fastebm.ops import uniform
from fastebm.rng import Stream
from fastebm.tasks.climb import Climb, climb, energies_of
from fastebm.tasks.energies import Model, level_gradients, top_gradient
from fastebm.tasks.inputs import checked_images
from fastebm.tasks.masks import check_hole_mask


@dataclass(frozen=True)
class InpaintOptions:
    """How chains fill in.

    Attributes:
        num_steps: updates, at each level.
        step_size: of each.
        noise_start, noise_end: std of the chains' noise, linear over all of them.
        restarts: chains of each image.
        coarse: whether chains start from U(-1, 1) at the lowest resolution and go up, with what is known pinned at
            each level: far better for large holes, for which it needs a run of variant "cascade". Without it they start
            at full size, with the hole at the mean of the known pixels around each of its own, and a little noise. (The
            authors start at 0 and noise; an energy that was trained coarse to fine can't lead away from such a gray.)
    """

    num_steps: int = 20
    step_size: float = 1.0
    noise_start: float = 0.015
    noise_end: float = 0.0
    restarts: int = 8
    coarse: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, got {self.num_steps} and {self.restarts}")


@dataclass(frozen=True, eq=False)
class InpaintingResult:
    """Images with holes and what was filled in.

    Attributes:
        images: (N, C, H, W), as they were given; what they have in the hole was not looked at.
        hole: bool, of the same shape.
        filled: (N, R, C, H, W), the ends of the R chains of each image, the lowest energy first; outside of the hole
            equal to `images` in every bit.
        energy: (N, R), ascending.
    """

    options: InpaintOptions
    images: Tensor
    hole: Tensor
    filled: Tensor
    energy: Tensor

    @property
    def best(self) -> Tensor:
        """Of each image the chain with the lowest energy, (N, C, H, W)."""
        return self.filled[:, 0]

    @property
    def mean(self) -> Tensor:
        """Of each image the mean of its chains, (N, C, H, W): nearer to what is right by squared error than a chain is,
        as the mean of a posterior is, and blurred where chains differ."""
        return torch.where(self.hole, self.filled.mean(1), self.images)

    @property
    def diversity(self) -> Tensor:
        """Of each image the root mean square over the hole of the chains' standard deviation, (N,); 0 for one chain."""
        variance = self.filled.var(1, correction=0) * self.hole
        return (variance.flatten(1).sum(1) / self.hole.flatten(1).sum(1)).sqrt()

    def errors(self) -> dict[str, Tensor]:
        """The root mean square difference over the hole from the images, (N,): of the "best" by energy, of the mean
        over chains of that ("chains"), of the chain that happens to be the "nearest", of the "mean" of the chains, and,
        as what that has to beat, of the mean of the known pixels around ("surroundings")."""
        pixels = self.hole.flatten(1).sum(1)

        def off(images: Tensor) -> Tensor:
            return (((images - self.images).square() * self.hole).flatten(1).sum(1) / pixels).sqrt()

        each = torch.stack([off(chain) for chain in self.filled.unbind(1)], 1)
        return {
            "best": each[:, 0],
            "mean_of_chains": each.mean(1),
            "nearest": each.min(1).values,
            "mean": off(self.mean),
            "neighbour_mean": off(neighbour_mean(self.images, self.hole)),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "images": len(self.images),
            "hole": float(self.hole.float().mean()),
            "options": dataclasses.asdict(self.options),
            "energy_best": float(self.energy[:, 0].mean()),
            "energy_all": float(self.energy.mean()),
            "diversity": float(self.diversity.mean()),
            "error": {name: float(values.mean()) for name, values in self.errors().items()},
        }


def inpaint(
    model: Model,
    images: Tensor,
    hole: Tensor,
    options: InpaintOptions | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = 256,
) -> InpaintingResult:
    """Fills in holes by several Langevin chains an image, ordered by their energy.

    Args:
        model: an energy, or a run, of which the highest level serves (and, with `options.coarse`, all).
        images: float32 (N, C, H, W) in [-1, 1]; in the hole they may be anything in that range.
        hole: bool, True where to fill in, broadcast to `images`.
        options: by default 8 chains of 20 steps, at full size.
        seed: of starts and chains; image i has the chains from `i * restarts` on.
        batch_size: chains at a time; the result does not depend on it.

    Raises ValueError or TypeError for images or holes that don't fit, FloatingPointError where energies are not finite.

    Example:
        >>> import torch
        >>> from fastebm.tasks import hole_mask, inpaint
        >>> def energy(x):  # of images without edges
        ...     edges = (x - x.roll(1, 2)).square() + (x - x.roll(1, 3)).square()
        ...     return 0.1 * edges.sum((1, 2, 3))
        >>> images = torch.full((2, 1, 8, 8), 0.5)
        >>> result = inpaint(energy, images, hole_mask("square", 2, 8))
        >>> result.filled.shape, bool((result.best - images).abs().max() < 0.1)
        (torch.Size([2, 8, 1, 8, 8]), True)
    """
    options = InpaintOptions() if options is None else options
    images = checked_images("images", images, model)
    hole = check_hole_mask(hole, images)
    top = top_gradient(model)
    size, count = images.shape[3], options.restarts
    levels = level_gradients(model) if options.coarse else {size: top}
    pinned = {level: _pinned(images, hole, size // level, count) for level in levels}
    known = pinned[min(levels)][1]
    draws = uniform(known.shape, seed=seed, stream=Stream.INITIAL, device=images.device)
    start = 2 * draws - 1
    if not options.coarse:
        start = neighbour_mean(images, hole).repeat_interleave(count, 0) + HOLE_NOISE * start
    how = Climb(options.num_steps, options.step_size, options.noise_start, options.noise_end)
    ends = climb(levels, start, how, seed=seed, pinned=pinned, batch_size=batch_size)[size].clamp(-1, 1)
    energy, order = energies_of(top, ends, batch_size).unflatten(0, (-1, count)).sort(dim=1, stable=True)
    filled = ends.unflatten(0, (-1, count))
    filled = torch.stack([of_one[places] for of_one, places in zip(filled, order, strict=True)])
    return InpaintingResult(options, images, hole, filled, energy)


def _pinned(images: Tensor, hole: Tensor, factor: int, num_chains: int) -> tuple[Tensor, Tensor]:
    """The mask of known pixels and their values at a level with `factor` times fewer pixels a side, once a chain.

    There a pixel is known where at least half of those that it stands for are, and is then their mean.
    """
    seen = (~hole).float()
    share = F.avg_pool2d(seen, factor)
    mean = F.avg_pool2d(images * seen, factor) / share.clamp(min=torch.finfo(share.dtype).tiny)
    mask, known = (share >= 0.5, mean) if factor > 1 else (~hole, images)
    return mask.repeat_interleave(num_chains, 0), known.repeat_interleave(num_chains, 0)
