"""Holes in images: what chains that fill them in start from, and holes of every kind to learn from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.ops.uniform import uniform
from fastebm.rng import Stream

HOLE_NOISE = 0.03
"""A hole at its own size starts with U(-0.03, 0.03), as "small" noise as in the authors' repository, around a fill."""


def neighbour_mean(images: Tensor, hole: Tensor) -> Tensor:
    """`images` (N, C, H, W) with each pixel of the hole at the mean of the known ones around it, in the same colour.

    "Around" is the smallest square of 3, 5, 9, 17 and so on a side that has any; 0 where a colour has none at all.
    """
    seen = (~hole).float()
    filled, missing, radius = images * seen, hole, 1
    while missing.any() and radius < 2 * max(images.shape[2:]):
        share, mean = (F.avg_pool2d(x, 2 * radius + 1, 1, radius) for x in (seen, images * seen))
        # Less than a pixel's share is rounding.
        found = missing & (share > 0.5 / (2 * radius + 1) ** 2)
        filled = torch.where(found, mean / share, filled)
        missing, radius = missing & ~found, 2 * radius
    return filled


def random_hole_masks(
    count: int, size: int, *, seed: int, positions: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Holes (count, 1, size, size), bool, True where a pixel is missing, each a function of seed and position alone.

    Half of them are rectangles anywhere, half to all of the image long and a quarter to half of it wide, so that
    middles, halves and margins come; the others are single pixels, a quarter to three quarters of all.

    Args:
        seed, positions: as in `fastebm.data.flip`.
    """
    draws = uniform((count, 8), seed=seed, step=0, stream=Stream.HOLE, chain_ids=positions, device=device)
    pixels = uniform((count, 1, size, size), seed=seed, step=1, stream=Stream.HOLE, chain_ids=positions, device=device)
    kind, share, long, short, turned, top, left = draws.unbind(1)[:7]
    sides = torch.stack((size * (0.5 + 0.5 * long), size * (0.25 + 0.25 * short))).round().clamp(min=1)
    height, width = torch.where(turned > 0.5, sides, sides.flip(0))
    rows, columns = (_between(size, (size - side + 1) * place, side) for side, place in ((height, top), (width, left)))
    rectangle = rows[:, None, :, None] & columns[:, None, None, :]
    scattered = pixels < (0.25 + 0.5 * share)[:, None, None, None]
    return torch.where((kind > 0.5)[:, None, None, None], rectangle, scattered)


def _between(size: int, start: Tensor, length: Tensor) -> Tensor:
    """bool (N, size), True at `length` places from the whole part of `start` on, or earlier if they did not fit."""
    start = torch.minimum(start.floor(), size - length)[:, None]
    places = torch.arange(size, device=start.device)
    return (places >= start) & (places < start + length[:, None])
