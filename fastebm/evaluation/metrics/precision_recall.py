"""Precision and recall of samples: the share of samples that look real, and the share of real images they cover."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastebm.evaluation.metrics.features import float64_features

NEIGHBOURS = 3
_ROWS = 2048  # of distances at a time: 50,000 columns of float64 are then 0.8 GB


class PrecisionRecall(NamedTuple):
    """Share of samples in the manifold of real images, and share of real images in the manifold of samples."""

    precision: float
    recall: float


def precision_recall(samples: Tensor, real: Tensor, *, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., 2019).

    The manifold of a set is the union of balls around its members, each with the distance to the member's k-th nearest
    neighbour in the set as its radius. Precision is the share of `samples` in the manifold of `real`, recall the share
    of `real` in that of `samples`. Both depend on the counts: compare values of equal counts only.

    Args:
        samples, real: features (N, D) and (M, D), N and M > neighbours.
        neighbours: k.

    Raises ValueError for shapes that don't fit and fewer features.
    """
    samples, real = float64_features(samples, real)
    if not 1 <= neighbours < min(len(samples), len(real)):
        raise ValueError(f"neighbours must be from 1 to one less than {min(len(samples), len(real))}, got {neighbours}")
    # Distances by matrix products lose the fewest digits where features are centred.
    samples, real = samples - real.mean(dim=0), real - real.mean(dim=0)
    return PrecisionRecall(_share_within(samples, real, neighbours), _share_within(real, samples, neighbours))


def _share_within(points: Tensor, members: Tensor, neighbours: int) -> float:
    radii = torch.cat([_distances(part, members).kthvalue(neighbours + 1).values for part in members.split(_ROWS)])
    inside = [(_distances(part, members) <= radii).any(dim=1) for part in points.split(_ROWS)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
