"""The training images nearest to samples, which show whether a model has memorised them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.data import Images
from fastebm.tasks.arguments import check_layout, check_values, check_whole


@dataclass(frozen=True, eq=False)
class NearestImages:
    """For each of N images its k nearest images of a reference set, the nearest first.

    Attributes:
        images: (N, k, C, H, W), images of the reference.
        indices: int64 (N, k), their indices in the reference.
        distances: (N, k), Euclidean distances over all pixels in [-1, 1].
    """

    images: Tensor
    indices: Tensor
    distances: Tensor


def nearest_images(
    images: Tensor, reference: Images | Tensor, count: int = 3, *, batch_size: int = 4096
) -> NearestImages:
    """The `count` nearest of `reference` to each of `images`.

    Args:
        images: float32 (N, C, H, W), finite; samples may lie slightly outside of [-1, 1].
        reference: at least `count` images of the same shape, as `Images` or float32 in [-1, 1].
        batch_size: images of the reference that are compared at a time, and made floats where they are bytes.

    Raises ValueError or TypeError for images that don't fit, and for numbers out of range.
    """
    check_layout("images", images)
    check_values("images", images, bounded=False)
    if not isinstance(reference, Images):
        check_layout("images of the reference", reference)
        check_values("images of the reference", reference)
    count, batch_size = check_whole("count", count), check_whole("batch_size", batch_size)
    shape = tuple((reference.pixels if isinstance(reference, Images) else reference).shape[1:])
    if images.shape[1:] != shape or not 1 <= count <= len(reference):
        raise ValueError(
            f"nearest images need 1 to {len(reference)} of them and one shape, got a count of {count}, images "
            f"{tuple(images.shape)} and a reference of {shape}"
        )
    flat = images.flatten(1)
    distances = torch.empty(len(images), 0, device=images.device)
    indices = torch.empty(len(images), 0, dtype=torch.int64, device=images.device)
    for first in range(0, len(reference), batch_size):
        part = _rows(reference, slice(first, first + batch_size), images.device).flatten(1)
        # Not by matrix products: their rounding would hide that a distance is zero.
        here = torch.cdist(flat, part, compute_mode="donot_use_mm_for_euclid_dist")
        places = torch.arange(first, first + len(part), device=images.device).expand(len(images), -1)
        distances, order = torch.cat((distances, here), 1).sort(dim=1, stable=True)
        indices = torch.cat((indices, places), 1).gather(1, order)[:, :count]
        distances = distances[:, :count]
    nearest = _rows(reference, indices.flatten(), images.device).unflatten(0, indices.shape)
    return NearestImages(nearest, indices, distances)


def _rows(reference: Images | Tensor, rows: slice | Tensor, device: torch.device) -> Tensor:
    if isinstance(reference, Images):
        return reference.batch(rows, device)
    return reference[rows if isinstance(rows, slice) else rows.to(reference.device)].to(device)
