"""The training images next to samples, by which a person sees whether a model has learned or memorised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.data import Images


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Of each image those of a reference that are next to it, the nearest first.

    Attributes:
        images: (N, k, C, H, W), of the reference.
        indices: int64 (N, k), their places there.
        distances: (N, k), Euclidean, over all pixels in [-1, 1].
    """

    images: Tensor
    indices: Tensor
    distances: Tensor


def nearest_images(images: Tensor, reference: Images | Tensor, count: int = 3, *, at_once: int = 4096) -> Neighbours:
    """The `count` nearest of `reference` to each of `images`.

    Args:
        images: float32 (N, C, H, W).
        reference: at least `count` images of the same shape; as bytes, they become floats `at_once` at a time.

    Raises ValueError for shapes that don't fit, and for a count out of range.
    """
    shape = tuple((reference.pixels if isinstance(reference, Images) else reference).shape[1:])
    if images.shape[1:] != shape or not 1 <= count <= len(reference):
        raise ValueError(
            f"nearest images need 1 to {len(reference)} of them and one shape, got a count of {count}, images "
            f"{tuple(images.shape)} and a reference of {shape}"
        )
    flat = images.flatten(1)
    distances = torch.empty(len(images), 0, device=images.device)
    indices = torch.empty(len(images), 0, dtype=torch.int64, device=images.device)
    for first in range(0, len(reference), at_once):
        part = _rows(reference, slice(first, first + at_once), images.device).flatten(1)
        # Not by matrix products: their rounding would hide that a distance is zero.
        here = torch.cdist(flat, part, compute_mode="donot_use_mm_for_euclid_dist")
        places = torch.arange(first, first + len(part), device=images.device).expand(len(images), -1)
        distances, order = torch.cat((distances, here), 1).sort(dim=1, stable=True)
        indices = torch.cat((indices, places), 1).gather(1, order)[:, :count]
        distances = distances[:, :count]
    nearest = _rows(reference, indices.flatten(), images.device).unflatten(0, indices.shape)
    return Neighbours(nearest, indices, distances)


def _rows(reference: Images | Tensor, rows: slice | Tensor, device: torch.device) -> Tensor:
    if isinstance(reference, Images):
        return reference.batch(rows, device)
    return reference[rows if isinstance(rows, slice) else rows.to(reference.device)].to(device)
