"""Distances between two sets of images by their features: Fréchet, kernel, precision and recall. All in float64."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastebm.ops.uniform import uniform
from fastebm.rng import Stream
from fastebm.runs.files import replacing

NEIGHBOURS = 3
SUBSETS = 100
SUBSET_SIZE = 1000
_ROWS = 2048  # of distances at a time: 50,000 columns of float64 are then 0.8 GB


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of features, all that a Fréchet distance needs of a set.

    Attributes:
        mean: float64 (D,).
        covariance: float64 (D, D), the unbiased one, divided by N - 1.
        label: names the features, so that others are told; None where nobody knows.

    Raises ValueError for other shapes and for values that are not finite.
    """

    mean: Tensor
    covariance: Tensor
    label: str | None = None

    def __post_init__(self) -> None:
        width = self.mean.shape[0] if self.mean.ndim == 1 else 0
        if not width or self.covariance.shape != (width, width):
            raise ValueError(
                f"statistics need a mean (D,) and a covariance (D, D), got {tuple(self.mean.shape)} and "
                f"{tuple(self.covariance.shape)}"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("statistics need a mean and a covariance that are finite")

    @classmethod
    def of(cls, features: Tensor, label: str | None = None) -> FeatureStatistics:
        """Those of features (N, D), N >= 2. Raises ValueError for others."""
        features = _checked("features", features)
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), label)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Reads an .npz file with `mu` (D,) and `sigma` (D, D), as FID statistics are commonly kept; ours have
        the label beside them as `features`.

        Raises ValueError for a file that holds no such arrays, FileNotFoundError where there is none.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
                label = _label(arrays["features"]) if "features" in arrays.files else None
        except (KeyError, ValueError, AttributeError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: is no .npz file of statistics with arrays mu and sigma ({error})") from error
        try:
            return cls(mean, covariance, label)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes what `load` reads, all or nothing. Other readers of the format pass over the label."""
        arrays = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy()}
        if self.label is not None:
            arrays["features"] = np.array(self.label)
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def check_label(self, label: str | None) -> None:
        """Raises ValueError where these are known to be of other features than those that `label` names."""
        if None not in (self.label, label) and self.label != label:
            raise ValueError(f"statistics of the features {self.label} and {label}: they must be of one kind")


def frechet_distance(a: Tensor | FeatureStatistics, b: Tensor | FeatureStatistics) -> float:
    """The squared Fréchet distance of two normal distributions with the features' means and covariances (Heusel et
    al., 2017): `|m - n|^2 + tr(A + B - 2 (A B)^(1/2))`. In Inception's features it is called FID.

    The trace of the root is the sum of the singular values of A^(1/2) B^(1/2), with roots from symmetric eigenvalue
    problems: real and never negative, whatever the ranks.

    Args:
        a, b: features (N, D), N >= 2, or their statistics.

    Raises ValueError for shapes that don't fit, for statistics with different labels, and for features that are not
    finite.

    Example:
        >>> import torch
        >>> from fastebm.evaluation import frechet_distance
        >>> x = torch.randn(1000, 8)
        >>> round(frechet_distance(x, x + 2), 6)
        32.0
    """
    first, second = (x if isinstance(x, FeatureStatistics) else FeatureStatistics.of(x) for x in (a, b))
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features have {len(first.mean)} and {len(second.mean)} columns; they must be of one kind")
    first.check_label(second.label)
    means = (first.mean - second.mean).square().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    shared = torch.linalg.svdvals(_root(first.covariance) @ _root(second.covariance)).sum()
    return max(0.0, float(means + traces - 2 * shared))


class KernelDistance(NamedTuple):
    """Mean and standard deviation of a kernel distance over subsets."""

    mean: float
    std: float


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """The squared maximum mean discrepancy under the kernel `(x·y / D + 1)^3`, without bias (Binkowski et al., 2018).
    In Inception's features it is called KID; unlike FID it does not depend on the number of samples.

    Args:
        a, b: features (N, D) and (M, D), N and M >= 2.
        subsets: pairs of subsets, drawn without replacement, over which it is averaged.
        subset_size: of each; smaller where there are fewer features.
        seed: of the subsets, which are a function of it.

    Raises ValueError for shapes that don't fit and counts out of range.
    """
    a, b = _checked_pair(a, b)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets must be at least 1 and subset_size at least 2, got {subsets} and {subset_size}")
    size = min(subset_size, len(a), len(b))
    values = torch.tensor(
        [
            _discrepancy(a[_subset(len(a), size, seed, 2 * number)], b[_subset(len(b), size, seed, 2 * number + 1)])
            for number in range(subsets)
        ],
        dtype=torch.float64,
    )
    return KernelDistance(float(values.mean()), float(values.std(correction=0)))


class PrecisionRecall(NamedTuple):
    """Share of samples that look real, and share of what is real that samples cover."""

    precision: float
    recall: float


def precision_recall(samples: Tensor, real: Tensor, *, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., 2019).

    A feature belongs to a set's manifold where it lies in the ball around one of the set's members that reaches to
    that one's k-th nearest other member. Precision is the share of `samples` in the manifold of `real`, recall the
    share of `real` in that of `samples`. Both depend on the counts: compare equal ones.

    Args:
        samples, real: features (N, D) and (M, D), N and M > neighbours.
        neighbours: k.

    Raises ValueError for shapes that don't fit and fewer features.
    """
    samples, real = _checked_pair(samples, real)
    if not 1 <= neighbours < min(len(samples), len(real)):
        raise ValueError(f"neighbours must be from 1 to one less than {min(len(samples), len(real))}, got {neighbours}")
    # From the middle of the real ones, where products of features lose the fewest digits.
    samples, real = samples - real.mean(dim=0), real - real.mean(dim=0)
    return PrecisionRecall(_share_within(samples, real, neighbours), _share_within(real, samples, neighbours))


def _share_within(points: Tensor, members: Tensor, neighbours: int) -> float:
    radii = torch.cat([_distances(part, members).kthvalue(neighbours + 1).values for part in members.split(_ROWS)])
    inside = [(_distances(part, members) <= radii).any(dim=1) for part in points.split(_ROWS)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def _discrepancy(a: Tensor, b: Tensor) -> float:
    """Of N and N features, without bias: pairs of a feature with itself are left out."""
    count = len(a)
    # x·y / D + 1 as a single product: of vectors with a 1 behind.
    a, b = (F.pad(x / x.shape[1] ** 0.5, (0, 1), value=1.0) for x in (a, b))

    def cubes(values: Tensor) -> Tensor:
        return values.square().flatten() @ values.flatten()  # many times faster than pow

    def among(x: Tensor) -> Tensor:
        return (cubes(x @ x.T) - cubes(x.square().sum(dim=1))) / (count * (count - 1))

    return float(among(a) + among(b) - 2 * cubes(a @ b.T) / count**2)


def _subset(count: int, size: int, seed: int, number: int) -> Tensor:
    return uniform((1, count), seed=seed, step=number, stream=Stream.SHUFFLE)[0].argsort(stable=True)[:size]


def _label(stored: np.ndarray) -> str | None:
    """The label in a file; None for an array of that name that is something else."""
    return str(stored) if stored.ndim == 0 and stored.dtype.kind == "U" else None


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a covariance, whose eigenvalues below 0 are rounding."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _checked(name: str, features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2 or not features.shape[1] or not features.isfinite().all():
        raise ValueError(f"{name} must be finite and (N, D) with N >= 2, got {tuple(features.shape)}")
    return features.detach().double()


def _checked_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _checked("features", a), _checked("features", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have {a.shape[1]} and {b.shape[1]} columns; they must be of one kind")
    return a, b
