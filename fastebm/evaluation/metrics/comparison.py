"""Samples against real images in features, always beside the floor (real against real) and the ceiling (noise)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastebm.data import Images
from fastebm.evaluation.metrics.distances import PrecisionRecall, frechet_distance, kernel_distance, precision_recall
from fastebm.evaluation.metrics.features import FeatureExtractor, chosen
from fastebm.ops.uniform import uniform
from fastebm.rng import Stream

MIN_COUNT = 10
MIN_UNSEEN = 1000
PRECISION_COUNT = 5000
"""Precision and recall compare all with all: of more samples the first so many are taken."""

Describe = Callable[[Tensor | Images], FeatureExtractor]


@dataclass(frozen=True)
class Distances:
    """Distances of `count` images from `reference` real ones, in features.

    Attributes:
        frechet, kernel, kernel_std: `frechet_distance` and `kernel_distance` of all of both, 0 for equal sets.
        precision, recall: shares, of as many images of each set, 5,000 at most, as they depend on the counts.
    """

    count: int
    reference: int
    frechet: float
    kernel: float
    kernel_std: float
    precision: float
    recall: float


Measure = Callable[[Tensor, Tensor], Distances]


def feature_distances(samples: Tensor, real: Tensor) -> Distances:
    """All distances between features (N, D) and (M, D), as this package computes them."""
    kernel = kernel_distance(samples, real)
    return Distances(len(samples), len(real), frechet_distance(samples, real), *kernel, *shares(samples, real))


def shares(samples: Tensor, real: Tensor) -> PrecisionRecall:
    """Precision and recall of the first of each, as many of both and 5,000 at most."""
    count = min(len(samples), len(real), PRECISION_COUNT)
    return precision_recall(samples[:count], real[:count])


@dataclass(frozen=True)
class RealImages:
    """Real images: those to compare with, and others, never shown to a model where there are such, for the floor.

    Attributes:
        train: what samples are compared with.
        test: images that were held out, or None. Fewer than 1,000 of them serve only where all sets are small;
            otherwise the floor is measured between disjoint halves of `train`.
        seed: of the draws from both.
    """

    train: Images
    test: Images | None = None
    seed: int = 0

    def reference(self, count: int) -> Images:
        """`count` of the train images, or all if there are fewer."""
        return chosen(self.train, self.order[:count])

    def unseen(self, count: int) -> tuple[Images, Images]:
        """As many real images as there are, up to `count`, that are not in the reference of their number; and all
        train images that they may be compared with."""
        if (test := self._test(count)) is not None:
            draws = uniform((1, len(test)), seed=self.seed, step=2, stream=Stream.SHUFFLE)[0]
            return chosen(test, draws.argsort(stable=True)[:count]), self.train
        number = min(count, len(self.train) // 2)
        return chosen(self.train, self.order[-number:]), chosen(self.train, self.seen(count))

    def seen(self, count: int) -> Tensor:
        """int64: the train images that may be compared with `unseen`, in the order in which references take them."""
        return self.order if self._test(count) is not None else self.order[: -min(count, len(self.train) // 2)]

    def unseen_are(self, count: int) -> str:
        """What `unseen` gives, in words."""
        return "test images" if self._test(count) is not None else "train images of the other half"

    def _test(self, count: int) -> Images | None:
        enough = self.test is not None and len(self.test) >= min(count, MIN_UNSEEN, len(self.train))
        return self.test if enough else None

    @functools.cached_property
    def order(self) -> Tensor:
        """int64: all train images, in the order in which references take them."""
        draws = uniform((1, len(self.train)), seed=self.seed, step=1, stream=Stream.SHUFFLE)[0]
        return draws.argsort(stable=True)


@dataclass(frozen=True)
class Comparison:
    """Distances from real images, of samples and of what they stand between.

    Attributes:
        samples: of all samples.
        beside_floor: of as many samples as the floor is measured with, as distances depend on the count.
        floor: of real images that are not among those compared with: no generator should be expected below.
        noise: of uniform noise, the ceiling.
        floor_of: what the floor is measured with, in words.
    """

    samples: Distances
    beside_floor: Distances
    floor: Distances
    noise: Distances
    floor_of: str

    def rows(self) -> list[tuple[str, Distances]]:
        """All of them with their names, in the order of a table."""
        fewer = self.beside_floor.count != self.samples.count
        rows = [("samples", self.samples), *([("samples, fewer", self.beside_floor)] if fewer else [])]
        return [*rows, (f"floor: {self.floor_of}", self.floor), ("ceiling: uniform noise", self.noise)]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False)
class ComparisonResult:
    """A comparison, and what was made of the images for it: of samples, and of the floor's real ones."""

    comparison: Comparison
    samples: FeatureExtractor
    real: FeatureExtractor
    reference: FeatureExtractor


def compare(
    samples: Tensor,
    real: RealImages,
    describe: Describe,
    measure: Measure = feature_distances,
    *,
    all_real: bool = False,
) -> ComparisonResult:
    """Compares samples (N, C, H, W) in [-1, 1] with as many real images, or with all of them.

    Args:
        describe: gives features and probabilities of images, as a `FeatureClassifier` or `Inception` does.
        measure: gives the distances between features.
        all_real: compares all samples with all train images, as published FID does; otherwise with as many, and only as
            many samples as there are. The floor's images are then compared with all that they are not among.

    Raises ValueError where there are fewer than 10 samples, or too few real images to have 10 for the floor.
    """
    count = len(samples) if all_real else min(len(samples), len(real.train))
    floor_images, _ = real.unseen(count)
    few = min(count, len(floor_images))
    if few < MIN_COUNT:
        raise ValueError(
            f"{len(samples)} samples against {len(real.train)} real images, {len(floor_images)} for the floor: at "
            f"least {MIN_COUNT} of each are needed"
        )
    samples = samples[:count]
    of_samples, of_floor = describe(samples), describe(floor_images)
    of_noise = describe(noise_like(samples[:few], real.seed))
    if all_real:
        of_train = describe(real.train)
        of_reference, beyond = of_train.chosen(real.order), of_train.chosen(real.seen(count)).features
    else:
        of_reference = describe(real.reference(count))
        beyond = of_reference.features[:few]

    def distances(described: FeatureExtractor, number: int) -> Distances:
        reference = of_reference.features if all_real else of_reference.features[:number]
        return measure(described.features[:number], reference)

    of_all = distances(of_samples, count)
    comparison = Comparison(
        samples=of_all,
        beside_floor=of_all if few == count else distances(of_samples, few),
        floor=measure(of_floor.features[:few], beyond),
        noise=distances(of_noise, few),
        floor_of=real.unseen_are(count),
    )
    return ComparisonResult(comparison, of_samples, of_floor, of_reference)


def noise_like(samples: Tensor, seed: int = 0) -> Tensor:
    """Uniform noise in [-1, 1] of the shape of `samples`, which no generator should be worse than."""
    return uniform(tuple(samples.shape), seed=seed, stream=Stream.INITIAL).mul(2).sub(1)
