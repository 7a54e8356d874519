"""Distances to the nearest training image, which show whether samples are copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.data import Images
from fastebm.data.value_range import ValueRange, to_signed
from fastebm.evaluation.metrics.comparison import RealImages

NEAREST_COUNT = 500
_PART = 10_000  # train images compared at a time: as floats, those of a large set take gigabytes


@dataclass(frozen=True)
class NearestDistances:
    """Euclidean distances between images in [-1, 1] and their nearest among `num_reference` train images.

    Samples that are closer than unseen real images are copies.

    Attributes:
        count: samples that were compared, and as many real images that are not among the train images.
        median, first_percentile: of the samples' distances.
        median_real, first_percentile_real: of the real images' distances.
    """

    count: int
    num_reference: int
    median: float
    first_percentile: float
    median_real: float
    first_percentile_real: float

    @classmethod
    def of(cls, samples: Tensor, real: RealImages, *, value_range: ValueRange | None = None) -> NearestDistances:
        """Those of the first 500 samples (N, C, H, W) at most, each compared with all train images.

        `value_range` says which values are black and white, as in `fastebm.data.value_range.to_signed`, which raises
        errors; ValueError for samples of another shape than the real images.
        """
        samples = to_signed(samples[:NEAREST_COUNT].cpu(), value_range, "samples")
        held_out, reference = real.held_out(min(len(samples), NEAREST_COUNT))
        count = min(len(held_out), len(samples), NEAREST_COUNT)
        distances, distances_real = (
            _in_parts(images[:count], reference) for images in (samples, held_out.batch(slice(None)))
        )
        return cls.summary(len(reference), distances, distances_real)

    @classmethod
    def summary(cls, num_reference: int, distances: Tensor, distances_real: Tensor) -> NearestDistances:
        """Median and first percentile of distances (N,) of samples and (M,) of real images."""
        return cls(
            len(distances),
            num_reference,
            float(distances.median()),
            float(distances.quantile(0.01)),
            float(distances_real.median()),
            float(distances_real.quantile(0.01)),
        )


def nearest_distances(images: Tensor, reference: Tensor, *, batch_size: int = 1024) -> Tensor:
    """The Euclidean distance of each image to the nearest image of `reference`: float32 (N,).

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


def _in_parts(images: Tensor, reference: Images) -> Tensor:
    parts = [
        nearest_distances(images, reference.batch(slice(first, first + _PART)).cpu())
        for first in range(0, len(reference), _PART)
    ]
    return torch.stack(parts).amin(dim=0)
