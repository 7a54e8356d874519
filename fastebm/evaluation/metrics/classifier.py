"""A verdict on generated images of any labelled set: distances in a classifier's features, classes, nearest images."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastebm.data import Images
from fastebm.evaluation.metrics.comparison import Comparison, RealImages, compare
from fastebm.evaluation.metrics.features import NOT_COMPARABLE, FeatureClassifier
from fastebm.evaluation.metrics.nearest_neighbors import nearest_distances

CONFIDENT = 0.9
# A class is found with a tenth of an even share: of ten classes, a hundredth. Fewer may be the classifier's mistakes.
FOUND_SHARE = 0.1
NEAREST_COUNT = 500
_REFERENCES = 10_000  # compared at a time: as floats, the train images of a large set take gigabytes


@dataclass(frozen=True)
class Classes:
    """What a classifier takes samples for, beside what it takes unseen real images for.

    Attributes:
        names: of the classes.
        counts, counts_real: samples, and real images, by the class that the classifier gives them.
        confident_share, confident_share_real: shares with a class probability of at least 0.9.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    counts_real: tuple[int, ...]
    confident_share: float
    confident_share_real: float

    @classmethod
    def of(cls, names: tuple[str, ...], probabilities: Tensor, probabilities_real: Tensor) -> Classes:
        """Those of class probabilities (N, K) and (M, K)."""
        (sure, classes), (sure_real, classes_real) = probabilities.max(dim=1), probabilities_real.max(dim=1)
        return cls(
            names,
            tuple(torch.bincount(classes, minlength=len(names)).tolist()),
            tuple(torch.bincount(classes_real, minlength=len(names)).tolist()),
            float((sure >= CONFIDENT).double().mean()),
            float((sure_real >= CONFIDENT).double().mean()),
        )

    @property
    def found(self) -> int:
        """Classes with at least a tenth of an even share of the samples."""
        return _found(self.counts)

    @property
    def found_real(self) -> int:
        return _found(self.counts_real)

    @property
    def largest_share(self) -> float:
        """The share of the most frequent class."""
        return max(self.counts) / sum(self.counts)

    @property
    def largest_share_real(self) -> float:
        return max(self.counts_real) / sum(self.counts_real)

    @property
    def entropy(self) -> float:
        """Of the histogram of classes, in nats: from 0 for one class to log K for an even one."""
        return _entropy(self.counts)

    @property
    def entropy_real(self) -> float:
        return _entropy(self.counts_real)

    def to_json(self) -> dict[str, Any]:
        derived = ("found", "found_real", "largest_share", "largest_share_real", "entropy", "entropy_real")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class Nearest:
    """Euclidean distances between images in [-1, 1], from `count` samples, and as many unseen real images, to their
    nearest among `reference` train images. Samples that are closer than real ones are copies.

    Attributes:
        median, first_percentile: of samples.
        median_real, first_percentile_real: of real images that are not among the train images.
    """

    count: int
    reference: int
    median: float
    first_percentile: float
    median_real: float
    first_percentile_real: float

    @classmethod
    def of(cls, samples: Tensor, real: RealImages) -> Nearest:
        """Those of samples (N, C, H, W); at most 500 of them, as all train images are compared with."""
        unseen, reference = real.unseen(min(len(samples), NEAREST_COUNT))
        count = min(len(unseen), len(samples), NEAREST_COUNT)
        distances, distances_real = (
            _nearest(images[:count].cpu().float(), reference) for images in (samples, unseen.batch(slice(None)))
        )
        return cls(
            count,
            len(reference),
            float(distances.median()),
            float(distances.quantile(0.01)),
            float(distances_real.median()),
            float(distances_real.quantile(0.01)),
        )


@dataclass(frozen=True)
class EvaluationResult:
    """What samples are worth, as a classifier sees it that was trained on the data. Its distances are NOT comparable
    to published FID.

    Attributes:
        accuracy: of the classifier, on images that it has not seen.
        comparison: distances of samples, floor and ceiling.
        classes: None where the classifier was trained on rotations.
        nearest: distances from the train images.
    """

    accuracy: float
    comparison: Comparison
    classes: Classes | None
    nearest: Nearest

    def to_json(self) -> dict[str, Any]:
        return {
            "note": NOT_COMPARABLE,
            "accuracy": self.accuracy,
            "distances": self.comparison.to_json(),
            "classes": None if self.classes is None else self.classes.to_json(),
            "nearest": dataclasses.asdict(self.nearest),
        }


def evaluate_samples(
    samples: Tensor, real: RealImages, classifier: FeatureClassifier, *, all_real: bool = False
) -> EvaluationResult:
    """The verdict on samples (N, C, S, S) in [-1, 1] that are meant to look like `real`.

    With `all_real`, distances are of all samples from all train images, otherwise from as many.

    Raises ValueError for samples of other shapes or not finite, and fewer than 10.

    Example:
        >>> from fastebm.data import Images, digits, to_pixels
        >>> from fastebm.evaluation import RealImages, evaluate_samples, train_features
        >>> train, test = (Images(to_pixels(x), y) for x, y in (digits("train"), digits("test")))
        >>> classifier = train_features(train, test, images_seen=10_000)
        >>> verdict = evaluate_samples(test.batch(slice(0, 100)), RealImages(train, test), classifier)
        >>> verdict.classes.found
        10
    """
    compared = compare(samples, real, classifier, all_real=all_real)
    classes = None
    if classifier.task == "classes":
        classes = Classes.of(classifier.classes, compared.samples.probabilities, compared.real.probabilities)
    return EvaluationResult(classifier.accuracy, compared.comparison, classes, Nearest.of(samples, real))


def _nearest(images: Tensor, reference: Images) -> Tensor:
    parts = [
        nearest_distances(images, reference.batch(slice(first, first + _REFERENCES)).cpu())
        for first in range(0, len(reference), _REFERENCES)
    ]
    return torch.stack(parts).amin(dim=0)


def _found(counts: tuple[int, ...]) -> int:
    return sum(count > 0 and count >= FOUND_SHARE * sum(counts) / len(counts) for count in counts)


def _entropy(counts: tuple[int, ...]) -> float:
    shares = [count / sum(counts) for count in counts if count]
    return -sum(share * math.log(share) for share in shares) + 0.0
