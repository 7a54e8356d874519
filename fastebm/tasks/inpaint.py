"""Inpainting: chains fill in a hole; the known pixels are reset after every step, inside the kernel."""

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
from fastebm.sampling import Cascade, linear
from fastebm.tasks.arguments import (
    MAX_STEPS,
    check_batch_size,
    check_flag,
    check_memory,
    check_number,
    check_seed,
    check_whole,
    settle,
)
from fastebm.tasks.inputs import Model, open_energy
from fastebm.tasks.masks import check_hole_mask


@dataclass(frozen=True)
class InpaintOptions:
    """The settings of inpainting.

    Attributes:
        num_steps: the number of updates at each level.
        step_size: the step size of the updates.
        noise_start, noise_end: the noise of the first and of the last update; linear in between.
        restarts: chains for each image.
        coarse: whether chains start from U(-1, 1) at the lowest resolution, with known pixels at each level. That is
            far better for large holes; it needs a run of variant "cascade". Otherwise they start at full size, where
            each pixel of the hole has the mean of the known pixels around it, plus a little noise. (The authors start
            at 0 and noise; chains of an energy that was trained coarse to fine do not leave such a gray.)

    Raises ValueError or TypeError for numbers out of range.
    """

    num_steps: int = 20
    step_size: float = 1.0
    noise_start: float = 0.015
    noise_end: float = 0.0
    restarts: int = 8
    coarse: bool = False

    def __post_init__(self) -> None:
        settle(self, num_steps=check_whole("num_steps", self.num_steps, most=MAX_STEPS))
        settle(self, restarts=check_whole("restarts", self.restarts))
        settle(self, step_size=check_number("step_size", self.step_size, above=0))
        settle(self, noise_start=check_number("noise_start", self.noise_start, 0))
        settle(self, noise_end=check_number("noise_end", self.noise_end, 0))
        settle(self, coarse=check_flag("coarse", self.coarse))


@dataclass(frozen=True, eq=False)
class InpaintingResult:
    """Images with holes, and the same images with the holes filled in.

    Attributes:
        images: (N, C, H, W), as they were given; their pixels in the hole are not used.
        hole: bool, of the same shape, True where pixels are missing.
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
        """The chain with the lowest energy of each image, (N, C, H, W)."""
        return self.filled[:, 0]

    @property
    def mean(self) -> Tensor:
        """The mean of the chains of each image, (N, C, H, W).

        It has a smaller squared error than one chain, as the mean of a posterior has, and is blurred where they differ.
        """
        return torch.where(self.hole, self.filled.mean(1), self.images)

    @property
    def diversity(self) -> Tensor:
        """The standard deviation between the chains of each image, as root mean square over the hole, (N,)."""
        variance = self.filled.var(1, correction=0) * self.hole
        return (variance.flatten(1).sum(1) / self.hole.flatten(1).sum(1)).sqrt()

    def errors(self) -> dict[str, Tensor]:
        """Root mean square errors over the hole, (N,), against the pixels that `images` have there.

        Of the chain with the lowest energy ("best"), averaged over the chains ("mean_of_chains"), of the chain with the
        smallest error ("nearest"), of the mean of the chains ("mean"), and, as a baseline, of the means of the known
        pixels around ("neighbour_mean").
        """
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
    """Fills in holes by several Langevin chains for each image, ordered by their energy.

    Args:
        model: a run, the folder of one, or an energy of images. Of a coarse-to-fine run, chains use the highest level,
            and with `options.coarse` all levels.
        images: float32 (N, C, H, W) in [-1, 1], which can't be told from [0, 1]: `2 * images - 1` converts such images.
            Any values in that range may stand in the hole.
        hole: bool, True where pixels are missing: (H, W) for all images, or (N, C, H, W), where a 1 in place of N or C
            means all images or all channels. (The `mask` of `fastebm.Langevin` is the opposite: True where pixels are
            known.)
        options: by default 8 chains of 20 steps, at full size.
        seed: of starts and chains; image i has the chain ids from `i * restarts` on.
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
    check_seed(seed)
    check_batch_size(batch_size)
    energy = open_energy(model)
    images = energy.check_images("images", images)
    hole = check_hole_mask(hole, images)
    size, count = images.shape[3], options.restarts
    check_memory(f"{count:,} chains of each image", images.numel() * count, images.device)
    levels = energy.levels() if options.coarse else {size: energy.gradient}
    known_at = {level: _known_pixels(images, hole, size // level, count) for level in levels}
    mask, known = ({level: pair[place] for level, pair in known_at.items()} for place in (0, 1))
    shape = known[min(levels)].shape
    start = 2 * uniform(shape, seed=seed, stream=Stream.INITIAL, device=images.device) - 1
    if not options.coarse:
        start = neighbour_mean(images, hole).repeat_interleave(count, 0) + HOLE_NOISE * start
    noise = linear(options.noise_start, options.noise_end)
    step_size = energy.step_sizes(levels, options.step_size)
    cascade = Cascade(levels, num_steps=options.num_steps, step_size=step_size, noise_std=noise)
    ends = cascade.sample(None, seed, x0=start, mask=mask, known=known, batch_size=batch_size).clamp(-1, 1)
    energies, order = energy.energies(ends, batch_size).unflatten(0, (-1, count)).sort(dim=1, stable=True)
    filled = ends.unflatten(0, (-1, count))
    filled = torch.stack([chains[places] for chains, places in zip(filled, order, strict=True)])
    return InpaintingResult(options, images, hole, filled, energies)


def _known_pixels(images: Tensor, hole: Tensor, factor: int, num_chains: int) -> tuple[Tensor, Tensor]:
    """The mask of known pixels and their values at a level with `factor` times fewer pixels a side, for each chain.

    The mask is True where a pixel is known, the opposite of `hole`. A pixel of a lower level is known if at least half
    of the pixels that it averages are; its value is the mean of those.
    """
    seen = (~hole).float()
    share = F.avg_pool2d(seen, factor)
    mean = F.avg_pool2d(images * seen, factor) / share.clamp(min=torch.finfo(share.dtype).tiny)
    mask, known = (share >= 0.5, mean) if factor > 1 else (~hole, images)
    return mask.repeat_interleave(num_chains, 0), known.repeat_interleave(num_chains, 0)
