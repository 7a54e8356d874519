"""Distances of samples from real images in features, next to those of other real images and of uniform noise."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastebm.data import Images
from fastebm.data.value_range import ValueRange, to_signed
from fastebm.evaluation.metrics.features import FeatureExtractor, Features, select
from fastebm.evaluation.metrics.frechet import frechet_distance
from fastebm.evaluation.metrics.kernel import kernel_distance
from fastebm.evaluation.metrics.precision_recall import PrecisionRecall, precision_recall
from fastebm.ops.uniform import uniform
from fastebm.rng import Stream

MIN_COUNT = 10
MIN_TEST = 1000
PRECISION_COUNT = 5000
"""Precision and recall compare every image with every other: of larger sets the first so many are taken."""


@dataclass(frozen=True)
class Distances:
    """Distances of `count` images from `num_reference` real ones, in features.

    Attributes:
        frechet, kernel, kernel_std: `frechet_distance` and `kernel_distance` of all of both, 0 for equal sets.
        precision, recall: shares. They depend on the counts and are of equally many images of both, 5,000 at most.
    """

    count: int
    num_reference: int
    frechet: float
    kernel: float
    kernel_std: float
    precision: float
    recall: float


DistanceFunction = Callable[[Tensor, Tensor], Distances]


def feature_distances(samples: Tensor, real: Tensor) -> Distances:
    """All distances between features (N, D) and (M, D), as this package computes them."""
    kernel = kernel_distance(samples, real)
    shares = equal_precision_recall(samples, real)
    return Distances(len(samples), len(real), frechet_distance(samples, real), *kernel, *shares)


def equal_precision_recall(samples: Tensor, real: Tensor) -> PrecisionRecall:
    """Precision and recall of the first features of each set, as many of both and 5,000 at most."""
    count = min(len(samples), len(real), PRECISION_COUNT)
    return precision_recall(samples[:count], real[:count])


@dataclass(frozen=True)
class RealImages:
    """Real images that samples are compared with, and held-out ones for comparing real images with real images.

    Attributes:
        train: the images that samples are compared with.
        test: images that no model was trained on, or None. Fewer than 1,000 of them are used only where all sets are
            small; otherwise disjoint parts of `train` are compared.
        seed: of the random choice from both.

    Raises ValueError for train and test images of different shapes.
    """

    train: Images
    test: Images | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.test is not None and self.test.pixels.shape[1:] != self.train.pixels.shape[1:]:
            raise ValueError(
                f"train and test images must have one shape, got {tuple(self.train.pixels.shape)} and "
                f"{tuple(self.test.pixels.shape)}"
            )

    def subset(self, count: int) -> Images:
        """`count` of the train images, or all if there are fewer."""
        return select(self.train, self.order[:count])

    def held_out(self, count: int) -> tuple[Images, Images]:
        """At most `count` real images that are not in `subset(count)`, and all train images to compare them with.

        They are test images if there are enough; otherwise at most half of the train images, which are then not among
        those to compare with.
        """
        if (test := self._test(count)) is not None:
            draws = uniform((1, len(test)), seed=self.seed, step=2, stream=Stream.SHUFFLE)[0]
            return select(test, draws.argsort(stable=True)[:count]), self.train
        number = min(count, len(self.train) // 2)
        return select(self.train, self.order[-number:]), select(self.train, self.rest(count))

    def rest(self, count: int) -> Tensor:
        """int64: the train images that are not in `held_out(count)`, in the order in which `subset` takes them."""
        return self.order if self._test(count) is not None else self.order[: -min(count, len(self.train) // 2)]

    def held_out_kind(self, count: int) -> str:
        """In words, which images `held_out` returns."""
        return "test images" if self._test(count) is not None else "train images of the other half"

    def _test(self, count: int) -> Images | None:
        enough = self.test is not None and len(self.test) >= min(count, MIN_TEST, len(self.train))
        return self.test if enough else None

    @functools.cached_property
    def order(self) -> Tensor:
        """int64: all train images, in the order in which `subset` takes them."""
        draws = uniform((1, len(self.train)), seed=self.seed, step=1, stream=Stream.SHUFFLE)[0]
        return draws.argsort(stable=True)


@dataclass(frozen=True)
class Comparison:
    """Distances of samples from real images, and the two that they lie between.

    Attributes:
        samples: of all samples.
        samples_at_reference_count: of as many samples as `reference` has images, since distances depend on the count.
        reference: of held-out real images: no generator is expected to come closer.
        noise: of uniform noise: no generator should be farther away.
        reference_kind: in words, which images `reference` measures.
    """

    samples: Distances
    samples_at_reference_count: Distances
    reference: Distances
    noise: Distances
    reference_kind: str

    def rows(self) -> list[tuple[str, Distances]]:
        """All of them with their names, in the order of a table."""
        fewer = self.samples_at_reference_count.count != self.samples.count
        rows = [("samples", self.samples)]
        rows += [("samples, fewer", self.samples_at_reference_count)] if fewer else []
        return [*rows, (f"reference: {self.reference_kind}", self.reference), ("uniform noise", self.noise)]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False)
class ComparisonResult:
    """A comparison, and the features it was made of: of the samples, and of the held-out real images."""

    comparison: Comparison
    samples: Features
    held_out: Features


def compare(
    samples: Tensor,
    real: RealImages,
    extract: FeatureExtractor,
    measure: DistanceFunction = feature_distances,
    *,
    all_real: bool = False,
    value_range: ValueRange | None = None,
) -> ComparisonResult:
    """Compares samples (N, C, H, W) with as many real images, or with all of them.

    Args:
        extract: gives features and class probabilities of images, for example a `FeatureClassifier` or `Inception`.
        measure: gives the distances between features.
        all_real: compares all samples with all train images, as published FID does. By default as many samples as train
            images are compared: the smaller of the two counts. Held-out train images are never compared with
            themselves.
        value_range: the values of black and white in the samples, as in `fastebm.data.value_range.to_signed`.

    Raises ValueError for samples of another shape than the real images, where there are fewer than 10 samples, or too
    few real images to hold 10 out, and as `to_signed`.
    """
    if samples.ndim != 4 or samples.shape[1:] != real.train.pixels.shape[1:]:
        raise ValueError(
            f"samples must have the shape of the real images, (N, {', '.join(map(str, real.train.pixels.shape[1:]))}), "
            f"got {tuple(samples.shape)}"
        )
    count = len(samples) if all_real else min(len(samples), len(real.train))
    samples = to_signed(samples, value_range, "samples")
    held_out = check_counts(len(samples), real, all_real=all_real)
    few = min(count, len(held_out))
    samples = samples[:count]
    of_samples, of_held_out = extract(samples), extract(held_out)
    of_noise = extract(noise_like(samples[:few], real.seed))
    if all_real:
        of_train = extract(real.train).features
        of_real, of_rest = of_train[real.order], of_train[real.rest(count)]
    else:
        of_real = extract(real.subset(count)).features
        of_rest = of_real[:few]

    def distances(features: Features, number: int) -> Distances:
        return measure(features.features[:number], of_real if all_real else of_real[:number])

    of_all = distances(of_samples, count)
    comparison = Comparison(
        samples=of_all,
        samples_at_reference_count=of_all if few == count else distances(of_samples, few),
        reference=measure(of_held_out.features[:few], of_rest),
        noise=distances(of_noise, few),
        reference_kind=real.held_out_kind(count),
    )
    return ComparisonResult(comparison, of_samples, of_held_out)


def check_counts(count: int, real: RealImages, *, all_real: bool = False) -> Images:
    """The held-out real images that `compare` takes for `count` samples.

    Raises ValueError where there are fewer than 10 of samples, real or held-out images.
    """
    held_out, reference = real.held_out(count if all_real else min(count, len(real.train)))
    if min(count, len(held_out), len(reference)) < MIN_COUNT:
        raise ValueError(
            f"{count} samples against {len(real.train)} real images and {len(held_out)} held-out ones: at least "
            f"{MIN_COUNT} of each are needed"
        )
    return held_out


def noise_like(samples: Tensor, seed: int = 0) -> Tensor:
    """Uniform noise in [-1, 1] of the shape of `samples`."""
    return uniform(tuple(samples.shape), seed=seed, stream=Stream.INITIAL).mul(2).sub(1)
