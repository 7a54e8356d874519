"""Outlier scores from all levels of a cascade: mean and covariance of their energies over training images.

The energy of a cascade's highest level was trained on chains that come from the levels below it. For images that those
levels make improbable it was never trained, and it may give uniform noise a lower energy than any training image. So
every level scores the image, averaged down to its size as in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.compiler import EnergyGradient
from fastebm.data import average_pool_to
from fastebm.sampling.cascade import device_of
from fastebm.tasks.detection.batches import Energy, ImageBatches, check_finite, gradient_of, image_batches, over_images
from fastebm.tasks.detection.tails import UpperTail, fisher


@dataclass(frozen=True)
class LevelStatistics:
    """Mean and covariance of the energies of all levels, and of the logarithms of their gradients' norms.

    An image has 2L features with L levels: L energies and then L logarithms, both in ascending order of the size. The
    norms are positive and have a skewed distribution; their logarithms are closer to a Gaussian.

    Attributes:
        gradients: functions from images to energies and gradients, by size, ascending.
        mean: float64 (2L,), the mean of the training images' features.
        covariance: float64 (2L, 2L), their covariance.
        count: the number of training images.
        tails: upper tails over the training images, of the highest level's energy and of "level_typicality" by the
            statistics of all other images; the score "combined" needs them.
    """

    gradients: Mapping[int, EnergyGradient]
    mean: Tensor
    covariance: Tensor
    count: int
    tails: tuple[UpperTail, UpperTail] | None = None

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
        progress: bool | str = False,
    ) -> LevelStatistics:
        """The statistics of `levels` over training images alone.

        Args:
            levels: energies by size, for example `CoarseToFineRun.levels`; at least one.
            training_images: (N, C, S, S), with S the highest size or that times a power of two, N > 2L + 1; the
                statistics are reliable from thousands of images on.

        The other arguments and errors are those of `outlier_scores`. Raises ValueError also for no levels, too few
        images, and features that don't vary independently, such as those of a constant energy.

        Example:
            >>> import fastebm
            >>> from fastebm.tasks import LevelStatistics, outlier_scores
            >>> def energy(x):
            ...     return x.square().sum((1, 2, 3)) / 2 + x.sum((1, 2, 3))
            >>> images = fastebm.ops.uniform((50, 1, 4, 4), seed=0)
            >>> statistics = LevelStatistics.fit({2: energy, 4: energy}, images)
            >>> sorted(outlier_scores(energy, images, levels=statistics))
            ['combined', 'energy', 'gradient_norm', 'level_energy', 'level_typicality', 'total_variation']
        """
        if not levels:
            raise ValueError("there are no levels: statistics need at least one energy")
        gradients = {size: gradient_of(levels[size], dtype, engine) for size in sorted(levels)}
        device = device_of(levels[max(levels)]) if device is None else torch.device(device)

        def of(rows: range | None) -> Tensor:
            batches = image_batches(training_images, batch_size, device, progress, rows)
            return torch.cat([_features(gradients, batch, first) for first, batch in batches])

        features = over_images(training_images, of)
        if len(features) <= features.shape[1] + 1:
            raise ValueError(
                f"statistics of {len(levels)} levels need more than {features.shape[1] + 1} training images, "
                f"got {len(features)}"
            )
        covariance = torch.atleast_2d(features.T.cov(correction=0))
        _check_independent(covariance)
        mean = features.mean(0)
        # Distances from the statistics of all other images, as an image that is not among them has: by the formula of
        # Sherman and Morrison.
        squares, others = _distances(features, mean, covariance).square(), len(features) - 1
        without = (len(features) * squares / (others - squares).clamp(min=1e-9 * others)).sqrt()
        tails = UpperTail.fit(features[:, len(levels) - 1]), UpperTail.fit(without)
        return cls(gradients, mean, covariance, len(features), tails)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the levels, ascending."""
        return tuple(self.gradients)

    @property
    def highest(self) -> EnergyGradient:
        """The function from images to energies and gradients of the largest size."""
        return self.gradients[self.sizes[-1]]

    @property
    def mean_energies(self) -> dict[int, float]:
        """Mean energy of the training images, by size."""
        return dict(zip(self.sizes, self.mean.tolist(), strict=False))

    @property
    def energy_deviations(self) -> dict[int, float]:
        """Standard deviation of the energy over the training images, by size."""
        return dict(zip(self.sizes, self.covariance.diagonal().sqrt().tolist(), strict=False))

    def scores(self, images: Tensor, first: int = 0, top: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """The scores "combined", "level_energy" and "level_typicality", float64 (B,); `outlier_scores` defines them.

        Args:
            images: float32 (B, C, S, S) in [-1, 1].
            first: number of the first image in error messages.
            top: energies and gradient norms at the highest level, if the caller has them; computing them is most of
                the work.
        """
        features = _features(self.gradients, images, first, top)
        energies = len(self.gradients)
        deviations = self.covariance.diagonal().sqrt()
        standard = ((features - self.mean) / deviations)[:, :energies]
        distances = _distances(features, self.mean, self.covariance)
        scores = {"level_energy": standard.amax(1), "level_typicality": distances}
        if self.tails is not None:
            measured = (features[:, energies - 1], distances)
            logarithms = (tail.log_probability(each) for tail, each in zip(self.tails, measured, strict=True))
            scores["combined"] = fisher(logarithms)
        return scores


def _features(
    gradients: Mapping[int, EnergyGradient], images: Tensor, first: int, top: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The features of images: float64 (B, 2L) on the CPU."""
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


def _distances(features: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Mahalanobis distances of features (B, 2L) from their mean: (B,)."""
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, (features - mean).T, upper=False)
    return torch.linalg.vector_norm(white, dim=0)


def gradient_norms(slopes: Tensor) -> Tensor:
    """Euclidean norms of gradients (B, C, H, W): float64 (B,)."""
    return torch.linalg.vector_norm(slopes.flatten(1).double(), dim=1)


def _check_independent(covariance: Tensor) -> None:
    """Raises ValueError where a feature is constant, or a linear function of the others up to rounding."""
    deviations = covariance.diagonal().sqrt()
    correlation = covariance / deviations.outer(deviations)
    # float32 energies have 24 bits: eigenvalues below about the square of their rounding are noise.
    if not deviations.all() or float(torch.linalg.eigvalsh(correlation)[0]) < 2**-40:
        raise ValueError(
            "energies and gradient norms of the training images don't vary independently over the levels: is an energy "
            "constant, are two of them the same function, or are all images equal?"
        )
