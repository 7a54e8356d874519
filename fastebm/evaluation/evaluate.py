"""Evaluation of samples against real images: distances in features, predicted classes, and nearest training images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastebm.data import digits
from fastebm.data.value_range import SIGNED, ValueRange, to_signed
from fastebm.evaluation.metrics.comparison import Comparison, RealImages, compare
from fastebm.evaluation.metrics.features import NOT_COMPARABLE, FeatureClassifier
from fastebm.evaluation.metrics.nearest_neighbors import NearestDistances, nearest_distances
from fastebm.runs.interrupts import uninterrupted

CONFIDENT = 0.9
# In units of an even share, 1 / K with K classes. A class counts as found from a tenth of it on: of ten classes, one
# sample in a hundred. Fewer may be mistakes of the classifier.
FOUND_SHARE = 0.1
MAX_SHARE = 3
MIN_FOUND = 0.8
MAX_DISTANCE_RATIO = 1.5
MIN_DIGITS_ACCURACY = 0.97


@dataclass(frozen=True)
class PredictedClasses:
    """The classes that a classifier predicts for samples, and for unseen real images.

    Attributes:
        names: of the classes.
        counts, counts_real: samples, and real images, by predicted class.
        confident_share, confident_share_real: shares with a class probability of at least 0.9.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    counts_real: tuple[int, ...]
    confident_share: float
    confident_share_real: float

    @classmethod
    def of(cls, names: tuple[str, ...], probabilities: Tensor, probabilities_real: Tensor) -> PredictedClasses:
        """Those of class probabilities (N, K) and (M, K)."""
        (confidence, classes), (confidence_real, classes_real) = probabilities.max(dim=1), probabilities_real.max(dim=1)
        return cls(
            names,
            tuple(torch.bincount(classes, minlength=len(names)).tolist()),
            tuple(torch.bincount(classes_real, minlength=len(names)).tolist()),
            float((confidence >= CONFIDENT).double().mean()),
            float((confidence_real >= CONFIDENT).double().mean()),
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
        """Entropy of the histogram of classes in nats: from 0 for one class to log K for an even one."""
        return _entropy(self.counts)

    @property
    def entropy_real(self) -> float:
        return _entropy(self.counts_real)

    def to_json(self) -> dict[str, Any]:
        derived = ("found", "found_real", "largest_share", "largest_share_real", "entropy", "entropy_real")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of samples by a classifier of the data. Its distances are NOT comparable to published FID.

    Attributes:
        accuracy: of the classifier, on images that it was not trained on.
        classes: predicted classes; None where the classifier predicts rotations.
        nearest: distances to the nearest train images.
        comparison: distances in the classifier's features; None from `evaluate_digits`, whose classifier has none.
    """

    accuracy: float
    classes: PredictedClasses | None
    nearest: NearestDistances
    comparison: Comparison | None = None

    @property
    def diverse(self) -> bool:
        """Whether 80 % of the classes are found and none has more than three times an even share of the samples."""
        if self.classes is None:
            return True
        number = len(self.classes.names)
        return self.classes.found >= MIN_FOUND * number and self.classes.largest_share <= MAX_SHARE / number

    @property
    def novel(self) -> bool:
        """Whether the first percentile of distances to the train images is at least that of unseen real images."""
        return self.nearest.first_percentile >= self.nearest.first_percentile_real

    @property
    def realistic(self) -> bool:
        """Whether the median distance to the train images is at most 1.5 times that of unseen real images."""
        return self.nearest.median <= MAX_DISTANCE_RATIO * self.nearest.median_real

    @property
    def passed(self) -> bool:
        """Whether samples are diverse, novel and realistic."""
        return self.diverse and self.novel and self.realistic

    def to_json(self) -> dict[str, Any]:
        distances = {} if self.comparison is None else {"note": NOT_COMPARABLE, "distances": self.comparison.to_json()}
        return {
            **distances,
            "accuracy": self.accuracy,
            "classes": None if self.classes is None else self.classes.to_json(),
            "nearest": dataclasses.asdict(self.nearest),
            **{name: getattr(self, name) for name in ("diverse", "novel", "realistic", "passed")},
        }

    def explain(self) -> str:
        """Classes and nearest images as text, with what is required of each."""
        lines, nearest = [], self.nearest
        if (classes := self.classes) is not None:
            number = len(classes.names)
            counts = ", ".join(f"{name}: {count}" for name, count in zip(classes.names, classes.counts, strict=True))
            lines = [
                f"classes     {classes.found} of {number} are found among {sum(classes.counts)} samples ({counts}).",
                f"            The most frequent has {classes.largest_share:.0%}. Required: {MIN_FOUND:.0%} found, none "
                f"above {MAX_SHARE / number:.0%}.",
                f"            The classifier's accuracy on unseen real images is {self.accuracy:.1%}.",
                f"confidence  {classes.confident_share:.0%} of samples and {classes.confident_share_real:.0%} of real "
                f"images have a class probability of at least {CONFIDENT}.",
            ]
        return "\n".join(
            [
                *lines,
                f"realism     The median distance to the nearest train image is {nearest.median:.2f} from samples and "
                f"{nearest.median_real:.2f} from",
                f"            unseen real images. Required: at most {MAX_DISTANCE_RATIO * nearest.median_real:.2f}.",
                f"novelty     The first percentile of these distances is {nearest.first_percentile:.2f} for samples, "
                f"{nearest.first_percentile_real:.2f} for",
                "            unseen real images; copies are near 0. Required: no less than for real images.",
                f"The requirements are {'met' if self.passed else 'NOT met'}.",
            ]
        )


def evaluate_samples(
    samples: Tensor,
    real: RealImages,
    classifier: FeatureClassifier,
    *,
    all_real: bool = False,
    value_range: ValueRange | None = None,
) -> EvaluationResult:
    """Evaluates samples of a model of `real` by a classifier from `train_features`.

    Args:
        samples: (N, C, S, S), N >= 10, of the shape of the real images: floats in [-1, 1] or bytes.
        all_real: distances are from all samples to all train images, otherwise from as many to as many.
        value_range: the values of black and white in the samples, as in `fastebm.data.value_range.to_signed`; samples
            that all lie in [0, 1] need it.

    Raises ValueError for samples of other shapes, for fewer than 10, and as `to_signed`.

    Example:
        >>> from fastebm.data import Images, digits, to_pixels
        >>> from fastebm.evaluation import RealImages, evaluate_samples, train_features
        >>> train, test = (Images(to_pixels(x), y) for x, y in (digits("train"), digits("test")))
        >>> classifier = train_features(train, test, images_seen=10_000)
        >>> result = evaluate_samples(test.batch(slice(0, 100)), RealImages(train, test), classifier)
        >>> result.classes.found
        10
    """
    samples = to_signed(samples, value_range, "samples")
    compared = compare(samples, real, classifier, all_real=all_real, value_range=SIGNED)
    classes = None
    if classifier.task == "classes":
        probabilities = compared.samples.probabilities, compared.held_out.probabilities
        classes = PredictedClasses.of(classifier.classes, *probabilities)
    nearest = NearestDistances.of(samples, real, value_range=SIGNED)
    return EvaluationResult(classifier.accuracy, classes, nearest, compared.comparison)


def evaluate_digits(samples: Tensor, *, value_range: ValueRange | None = None) -> EvaluationResult:
    """Evaluates samples (N, 1, 8, 8), N >= 1, of a model of scikit-learn's handwritten digits.

    `value_range` says which values are black and white, as in `fastebm.data.value_range.to_signed`; by default samples
    are floats in [-1, 1] or bytes.

    The classifier is a logistic regression on Gaussian kernel features, fitted in seconds to the train split of
    `fastebm.data.digits`. 96 % of held-out digits have a class probability of at least 0.9, but no uniform noise and a
    third of the means of two digits; a support vector machine with calibrated probabilities separates them less well.
    Distances are of all samples, and of all held-out digits. Uniform noise has a median distance of 7, 3.4 times that
    of held-out digits.

    Raises ValueError for other shapes, and as `to_signed`, and RuntimeError where the classifier's accuracy on held-out
    digits is below 97 %, which would make its predictions useless.
    """
    if samples.ndim != 4 or samples.shape[1:] != (1, 8, 8) or not len(samples):
        raise ValueError(f"samples must be (N, 1, 8, 8) with N >= 1, got {tuple(samples.shape)}")
    samples = to_signed(samples.cpu(), value_range, "samples")
    train, train_labels = digits("train")
    real, real_labels = digits("test")
    predict = _digits_classifier(train, train_labels)
    probabilities_real = predict(real)
    accuracy = float((probabilities_real.argmax(dim=1) == real_labels).float().mean())
    if accuracy < MIN_DIGITS_ACCURACY:
        raise RuntimeError(f"the classifier's accuracy on held-out digits is {accuracy:.1%}, below 97 %")
    return EvaluationResult(
        accuracy,
        PredictedClasses.of(tuple(map(str, range(10))), predict(samples), probabilities_real),
        NearestDistances.summary(len(train), nearest_distances(samples, train), nearest_distances(real, train)),
    )


def _digits_classifier(images: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from images to class probabilities (N, 10)."""
    with uninterrupted():
        from sklearn.kernel_approximation import Nystroem
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

    kernel = Nystroem(gamma=0.04, n_components=600, random_state=0)
    classifier = make_pipeline(kernel, LogisticRegression(C=100.0, max_iter=2000))
    classifier.fit(images.flatten(1).numpy(), labels.numpy())
    return lambda images: torch.from_numpy(classifier.predict_proba(images.flatten(1).numpy()))


def _found(counts: tuple[int, ...]) -> int:
    return sum(count > 0 and count >= FOUND_SHARE * sum(counts) / len(counts) for count in counts)


def _entropy(counts: tuple[int, ...]) -> float:
    shares = [count / sum(counts) for count in counts if count]
    return -sum(share * math.log(share) for share in shares) + 0.0
