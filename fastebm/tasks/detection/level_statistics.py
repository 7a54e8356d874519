"""Outliers by all energies of a cascade at once: what each level typically says of training images.

The energy of a cascade's highest level has been taught by chains that come from the levels below it. Of images that
these would never have let through it knows nothing: it may rate uniform noise as more real than any image of training.
So every level has to be asked, about the image averaged down as in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.compiler import EnergyGradient
from fastebm.data import average_pool_to
from fastebm.sampling.cascade import device_of
from fastebm.tasks.detection.batches import Energy, ImageBatches, check_finite, checked_batches, prepared


@dataclass(frozen=True)
class LevelStatistics:
    """Mean and covariance of the energies of all levels, and of the logarithms of their gradients' norms.

    The features of an image are, with L levels, its L energies and then the L logarithms, each in ascending order of
    the size. Logarithms, because norms are positive and their distribution is skewed.

    Attributes:
        gradients: of the energies, by size, ascending.
        mean: float64 (2L,), of the features of training images.
        covariance: float64 (2L, 2L), likewise.
        count: of training images.
    """

    gradients: Mapping[int, EnergyGradient]
    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def fit(
        cls,
        levels: Mapping[int, Energy | EnergyGradient],
        training_images: ImageBatches,
        *,
        batch_size: int = 256,
        dtype: torch.dtype | None = torch.float32,
        engine: str = "auto",
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> LevelStatistics:
        """The statistics of `levels`, energies by size, over training images. Outliers have no part in them.

        Args:
            levels: such as `CoarseToFineRun.levels`; of one level or more.
            training_images: (N, C, S, S), with S the highest size or that times a power of two; more than 2L of them,
                and thousands for statistics that are worth something. Else as for `outlier_scores`, as are the other
                arguments and the errors.

        Raises ValueError also for no levels, for too few images, and for features that don't vary independently, as
        those of a constant energy.

        Example:
            >>> import fastebm
            >>> from fastebm.tasks import LevelStatistics, outlier_scores
            >>> def energy(x):
            ...     return x.square().sum((1, 2, 3)) / 2 + x.sum((1, 2, 3))
            >>> images = fastebm.ops.uniform((50, 1, 4, 4), seed=0)
            >>> statistics = LevelStatistics.fit({2: energy, 4: energy}, images)
            >>> sorted(outlier_scores(energy, images, levels=statistics))
            ['energy', 'gradient_norm', 'level_energy', 'level_typicality', 'total_variation']
        """
        if not levels:
            raise ValueError("there are no levels, whose energies make the statistics")
        gradients = {size: prepared(levels[size], dtype, engine) for size in sorted(levels)}
        where = device_of(levels[max(levels)]) if device is None else torch.device(device)
        features = torch.cat(
            [
                _features(gradients, batch, first)
                for first, batch in checked_batches(training_images, batch_size, where, progress)
            ]
        )
        if len(features) <= features.shape[1]:
            raise ValueError(
                f"statistics of {len(levels)} levels need more than {features.shape[1]} training images, "
                f"got {len(features)}"
            )
        covariance = torch.atleast_2d(features.T.cov(correction=0))
        _check_independent(covariance)
        return cls(gradients, features.mean(0), covariance, len(features))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the levels, ascending."""
        return tuple(self.gradients)

    @property
    def highest(self) -> EnergyGradient:
        """That of the largest size."""
        return self.gradients[self.sizes[-1]]

    @property
    def mean_energies(self) -> dict[int, float]:
        """Of training images, by size."""
        return dict(zip(self.sizes, self.mean.tolist(), strict=False))

    @property
    def energy_deviations(self) -> dict[int, float]:
        """Standard deviations of the energies of training images, by size."""
        return dict(zip(self.sizes, self.covariance.diagonal().sqrt().tolist(), strict=False))

    def scores(self, images: Tensor, first: int = 0, top: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """ "level_energy" and "level_typicality" of images, float64 (B,), as `outlier_scores` explains them.

        Args:
            images: float32 (B, C, S, S) in [-1, 1].
            first: the number of the first one, by which an error names an image.
            top: their energies and gradient norms at the highest level, where they are known: that is most of the work.
        """
        features = _features(self.gradients, images, first, top)
        energies = len(self.gradients)
        deviations = self.covariance.diagonal().sqrt()
        standard = ((features - self.mean) / deviations)[:, :energies]
        factor = torch.linalg.cholesky(self.covariance)
        white = torch.linalg.solve_triangular(factor, (features - self.mean).T, upper=False)
        return {
            "level_energy": standard.amax(1),
            "level_typicality": torch.linalg.vector_norm(white, dim=0),
        }


def _features(
    gradients: Mapping[int, EnergyGradient], images: Tensor, first: int, top: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """float64 (B, 2L) on the CPU."""
    energies, logarithms = [], []
    for size, gradient in gradients.items():
        if top is not None and size == max(gradients):
            values, norms = top
        else:
            values, slopes = gradient(average_pool_to(images, size))
            norms = gradient_norms(slopes)
        check_finite(f"energy at {size}x{size}", values, first)
        check_finite(f"gradient norm at {size}x{size}", norms, first)
        energies.append(values.double())
        logarithms.append(norms.double().clamp(min=torch.finfo(torch.float32).tiny).log())
    return torch.stack([*energies, *logarithms], dim=1).cpu()


def gradient_norms(slopes: Tensor) -> Tensor:
    """Euclidean norms of gradients (B, C, H, W): float64 (B,)."""
    return torch.linalg.vector_norm(slopes.flatten(1).double(), dim=1)


def _check_independent(covariance: Tensor) -> None:
    """Raises ValueError where a feature is constant, or given by the others but for rounding."""
    deviations = covariance.diagonal().sqrt()
    correlation = covariance / deviations.outer(deviations)
    # Features of float32 energies have 24 bits, so that what is below the square of their rounding is noise.
    if not deviations.all() or float(torch.linalg.eigvalsh(correlation)[0]) < 2**-40:
        raise ValueError(
            "energies and gradient norms of the training images don't vary independently over the levels: is an energy "
            "constant, are two of one kind, or are images all alike?"
        )
