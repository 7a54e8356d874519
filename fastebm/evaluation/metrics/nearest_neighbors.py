"""Distances to the nearest training image, which show whether samples are copies."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_distances(images: Tensor, reference: Tensor, *, batch_size: int = 1024) -> Tensor:
    """The Euclidean distance of each image to the nearest one of `reference`: float32 (N,).

    Args:
        images: (N, ...), floating point.
        reference: (M, ...) with M >= 1 and the same shape after the first dimension.
        batch_size: images compared at a time, which bounds memory to batch_size x M distances.

    Raises ValueError for shapes that don't fit.
    """
    if images.shape[1:] != reference.shape[1:] or not len(reference):
        raise ValueError(
            f"images and reference must have one shape and a reference, got {tuple(images.shape)} and "
            f"{tuple(reference.shape)}"
        )
    flat = reference.flatten(1).float()
    # Not by matrix products: their rounding would hide that a distance is zero.
    batches = [
        torch.cdist(part.flatten(1).float(), flat, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values
        for part in images.split(batch_size)
    ]
    return torch.cat(batches)
