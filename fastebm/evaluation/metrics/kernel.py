"""Kernel distance (squared maximum mean discrepancy) of two sets of features, which is KID in Inception's features."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.evaluation.metrics.features import float64_features
from fastebm.ops.uniform import uniform
from fastebm.rng import Stream

SUBSETS = 100
SUBSET_SIZE = 1000


class KernelDistance(NamedTuple):
    """Mean and standard deviation of a kernel distance over subsets."""

    mean: float
    std: float


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """The unbiased squared maximum mean discrepancy under the kernel `(x·y / D + 1)^3` (Binkowski et al., 2018).

    In Inception's features it is called KID. Unlike FID, its expectation does not depend on the number of samples.

    Args:
        a, b: features (N, D) and (M, D), N and M >= 2.
        subsets: pairs of subsets, drawn without replacement, over which the distance is averaged.
        subset_size: features in each subset; all of them where there are fewer.
        seed: determines the subsets.

    Raises ValueError for shapes that don't fit and counts out of range.
    """
    a, b = float64_features(a, b)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets must be at least 1 and subset_size at least 2, got {subsets} and {subset_size}")
    size = min(subset_size, len(a), len(b))
    values = torch.tensor(
        [
            _discrepancy(a[_subset(len(a), size, seed, 2 * number)], b[_subset(len(b), size, seed, 2 * number + 1)])
            for number in range(subsets)
        ],
        dtype=torch.float64,
        device="cpu",
    )
    return KernelDistance(float(values.mean()), float(values.std(correction=0)))


def _discrepancy(a: Tensor, b: Tensor) -> float:
    """The discrepancy of N and N features; without bias, because pairs of a feature with itself are left out."""
    count = len(a)
    # With a 1 appended to the scaled vectors, x·y / D + 1 is a single matrix product.
    a, b = (F.pad(x / x.shape[1] ** 0.5, (0, 1), value=1.0) for x in (a, b))

    def cubes(values: Tensor) -> Tensor:
        return values.square().flatten() @ values.flatten()  # many times faster than pow

    def among(x: Tensor) -> Tensor:
        return (cubes(x @ x.T) - cubes(x.square().sum(dim=1))) / (count * (count - 1))

    return float(among(a) + among(b) - 2 * cubes(a @ b.T) / count**2)


def _subset(count: int, size: int, seed: int, number: int) -> Tensor:
    return uniform((1, count), seed=seed, step=number, stream=Stream.SHUFFLE)[0].argsort(stable=True)[:size]
