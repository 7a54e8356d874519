"""Fréchet distance of two sets of features, which is FID in Inception's features, and the statistics it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastebm.data.errors import raise_as_data_error
from fastebm.evaluation.metrics.features import float64_features
from fastebm.runs.files import replacing


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of features: all that a Fréchet distance needs of a set.

    Attributes:
        mean: float64 (D,).
        covariance: float64 (D, D), unbiased: divided by N - 1.
        label: names the features, so that statistics of other features are refused; None if unknown.

    Raises ValueError for other shapes, for values that are not finite, and for a covariance that is not symmetric.
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
        slack = 1e-3 * self.covariance.abs().max()  # of files in float32
        if (self.covariance - self.covariance.T).abs().max() > slack or self.covariance.diag().min() < -slack:
            raise ValueError("a covariance must be symmetric, with variances that are not negative")

    @classmethod
    def of(cls, features: Tensor, label: str | None = None) -> FeatureStatistics:
        """The statistics of features (N, D), N >= 2. Raises ValueError for others."""
        (features,) = float64_features(features)
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), label)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Reads an .npz file with `mu` (D,) and `sigma` (D, D), the common format of FID statistics. Files of `save`
        have the label as a third array `features`.

        Raises ValueError for a file without such arrays, FileNotFoundError for a missing file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such file of statistics")
        with (
            raise_as_data_error(str(path), "is no .npz file of statistics with arrays mu and sigma"),
            np.load(path, allow_pickle=False) as arrays,
        ):
            mean, covariance = (_float64(name, arrays[name]) for name in ("mu", "sigma"))
            label = _label(arrays["features"]) if "features" in arrays.files else None
        try:
            return cls(mean, covariance, label)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the file completely or not at all. Other readers of the format ignore the label."""
        arrays = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy()}
        if self.label is not None:
            arrays["features"] = np.array(self.label)
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def check_label(self, label: str | None) -> None:
        """Raises ValueError where these statistics are known to be of other features than those that `label` names."""
        if None not in (self.label, label) and self.label != label:
            raise ValueError(f"statistics of the features {self.label} and {label}: they must be of one kind")


def frechet_distance(a: Tensor | FeatureStatistics, b: Tensor | FeatureStatistics) -> float:
    """The squared Fréchet distance of two normal distributions with the means m, n and covariances A, B of the
    features: `|m - n|^2 + tr(A + B - 2 (A B)^(1/2))` (Heusel et al., 2017). In Inception's features it is called FID.

    The trace of the root is computed as the sum of the singular values of A^(1/2) B^(1/2), with roots from symmetric
    eigenvalue problems. Unlike a general matrix root it is real and not negative for any ranks.

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


def _float64(name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} is {array.dtype}; real numbers are needed")
    return torch.from_numpy(array.astype(np.float64))


def _label(stored: np.ndarray) -> str | None:
    """The label in a file; None where the array of that name is something else."""
    return str(stored) if stored.ndim == 0 and stored.dtype.kind == "U" else None


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a covariance; its eigenvalues below 0 are rounding errors."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
