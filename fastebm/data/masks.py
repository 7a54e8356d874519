"""Masks of missing pixels for training, and the fill from which inpainting chains start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.ops.uniform import uniform
from fastebm.rng import Stream
from fastebm.scalars import as_int

HOLE_NOISE = 0.03
"""At full resolution the fill of a hole starts with U(-0.03, 0.03) noise: "small" noise, as in the authors' code."""


def neighbour_mean(images: Tensor, hole: Tensor) -> Tensor:
    """Replaces each pixel of the hole by the mean of the known pixels around it, channel by channel.

    The mean is over the smallest square of side 3, 5, 9, 17, ... that contains a known pixel; a channel without any
    known pixel becomes 0.

    Args:
        images: (N, C, H, W).
        hole: bool, broadcastable to `images`, True where a pixel is missing.
    """
    known = (~hole).float()
    filled, missing, radius = images * known, hole, 1
    while missing.any() and radius < 2 * max(images.shape[2:]):
        share, mean = (F.avg_pool2d(x, 2 * radius + 1, 1, radius) for x in (known, images * known))
        # A share below that of half a pixel is rounding error.
        found = missing & (share > 0.5 / (2 * radius + 1) ** 2)
        filled = torch.where(found, mean / share, filled)
        missing, radius = missing & ~found, 2 * radius
    return filled


def random_hole_masks(
    count: int, size: int, *, seed: int, positions: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Random masks, bool (count, 1, size, size), True where a pixel is missing.

    Half of the masks are rectangles at random places, whose long side is 1/2 to 1 of the image and whose short side is
    1/4 to 1/2, so that missing centres, halves and margins all occur. The other half are single pixels, 1/4 to 3/4 of
    all. Each mask is a function of `seed` and its position alone, which are as in `fastebm.data.flip`.
    """
    count, size = as_int("count", count), as_int("size", size)
    draws = uniform((count, 8), seed=seed, step=0, stream=Stream.HOLE, chain_ids=positions, device=device)
    pixels = uniform((count, 1, size, size), seed=seed, step=1, stream=Stream.HOLE, chain_ids=positions, device=device)
    kind, share, long, short, rotation, top, left = draws.unbind(1)[:7]
    sides = torch.stack((size * (0.5 + 0.5 * long), size * (0.25 + 0.25 * short))).round().clamp(min=1)
    height, width = torch.where(rotation > 0.5, sides, sides.flip(0))
    rows, columns = (_interval(size, (size - side + 1) * place, side) for side, place in ((height, top), (width, left)))
    rectangle = rows[:, None, :, None] & columns[:, None, None, :]
    scattered = pixels < (0.25 + 0.5 * share)[:, None, None, None]
    return torch.where((kind > 0.5)[:, None, None, None], rectangle, scattered)


def _interval(size: int, start: Tensor, length: Tensor) -> Tensor:
    """bool (N, size), True at `length` places from floor(start) on, moved left where they would not fit."""
    start = torch.minimum(start.floor(), size - length)[:, None]
    places = torch.arange(size, device=start.device)
    return (places >= start) & (places < start + length[:, None])
