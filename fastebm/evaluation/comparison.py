"""Samples against real images in features, always beside the floor (real against real) and the ceiling (noise)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastebm.data import Images
from fastebm.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from fastebm.evaluation.features import Described, chosen
from fastebm.ops.uniform import uniform
from fastebm.rng import Stream

MIN_COUNT = 10
MIN_UNSEEN = 1000
PRECISION_COUNT = 5000
"""Precision and recall compare all with all: of more samples the first so many are taken."""

Describe = Callable[[Tensor | Images], Described]


@dataclass(frozen=True)
class Distances:
    """Distances of `count` images from as many real ones, in features.

    Attributes:
        frechet, kernel, kernel_std: `frechet_distance` and `kernel_distance`, 0 for equal sets.
        precision, recall: shares, of at most 5,000 images of each set.
    """

    count: int
    frechet: float
    kernel: float
    kernel_std: float
    precision: float
    recall: float


Measure = Callable[[Tensor, Tensor], Distances]


def feature_distances(samples: Tensor, real: Tensor) -> Distances:
    """All distances between features (N, D) and (N, D), as this package computes them."""
    kernel = kernel_distance(samples, real)
    shares = precision_recall(samples[:PRECISION_COUNT], real[:PRECISION_COUNT])
    return Distances(len(samples), frechet_distance(samples, real), *kernel, *shares)


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
        return chosen(self.train, self._order[:count])

    def unseen(self, count: int) -> tuple[Images, Images]:
        """As many real images as there are, up to `count`, that are not in the reference of their number; and all
        train images that they may be compared with."""
        if (test := self._test(count)) is not None:
            draws = uniform((1, len(test)), seed=self.seed, step=2, stream=Stream.SHUFFLE)[0]
            return chosen(test, draws.argsort(stable=True)[:count]), self.train
        number = min(count, len(self.train) // 2)
        return chosen(self.train, self._order[-number:]), chosen(self.train, self._order[:-number])

    def unseen_are(self, count: int) -> str:
        """What `unseen` gives, in words."""
        return "test images" if self._test(count) is not None else "train images of the other half"

    def _test(self, count: int) -> Images | None:
        enough = self.test is not None and len(self.test) >= min(count, MIN_UNSEEN, len(self.train))
        return self.test if enough else None

    @functools.cached_property
    def _order(self) -> Tensor:
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
class Compared:
    """A comparison, and what was made of the images for it: of samples, and of the floor's real ones."""

    comparison: Comparison
    samples: Described
    real: Described
    reference: Described


def compare(samples: Tensor, real: RealImages, describe: Describe, measure: Measure = feature_distances) -> Compared:
    """Compares samples (N, C, H, W) in [-1, 1] with as many real images.

    Args:
        describe: gives features and probabilities of images, as a `FeatureClassifier` or `Inception` does.
        measure: gives the distances between features.

    Raises ValueError where there are fewer than 10 samples, or too few real images to have 10 for the floor.
    """
    count = min(len(samples), len(real.train))
    floor_images, _ = real.unseen(count)
    few = min(count, len(floor_images))
    if few < MIN_COUNT:
        raise ValueError(
            f"{len(samples)} samples against {len(real.train)} real images, {len(floor_images)} for the floor: at "
            f"least {MIN_COUNT} of each are needed"
        )
    samples = samples[:count]
    noise = uniform((few, *samples.shape[1:]), seed=real.seed, stream=Stream.INITIAL).mul(2).sub(1)
    of_samples, of_reference, of_floor = (describe(images) for images in (samples, real.reference(count), floor_images))
    of_noise = describe(noise)

    def distances(described: Described, number: int) -> Distances:
        return measure(described.features[:number], of_reference.features[:number])

    of_all = distances(of_samples, count)
    comparison = Comparison(
        samples=of_all,
        beside_floor=of_all if few == count else distances(of_samples, few),
        floor=distances(of_floor, few),
        noise=distances(of_noise, few),
        floor_of=real.unseen_are(count),
    )
    return Compared(comparison, of_samples, of_floor, of_reference)
