"""A judge of generated handwritten digits: a classifier that knows the real ones, and the distances from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastebm.data import digits
from fastebm.evaluation.metrics.nearest_neighbors import nearest_distances

CLASSES = 10
MIN_ACCURACY = 0.97
CONFIDENT = 0.9
MIN_CLASSES = 8
MAX_SHARE = 0.3
MAX_DISTANCE_RATIO = 1.5
# A class counts as found when one sample in a hundred is of it: fewer may be the classifier's mistakes.
FOUND_SHARE = 0.01


@dataclass(frozen=True)
class DigitsEvaluation:
    """What the judge found. Distances are Euclidean, between 8x8 images in [-1, 1].

    Attributes:
        samples: how many were judged.
        accuracy: share of held-out real digits that the classifier names rightly.
        class_counts: samples by the class that the classifier gives them.
        confident_share, confident_share_real: share of samples, and of held-out digits, with a class probability of
            at least 0.9.
        distance_median, distance_first_percentile: from samples to their nearest training digits.
        distance_median_real, distance_first_percentile_real: from held-out digits to theirs.
    """

    samples: int
    accuracy: float
    class_counts: tuple[int, ...]
    confident_share: float
    confident_share_real: float
    distance_median: float
    distance_first_percentile: float
    distance_median_real: float
    distance_first_percentile_real: float

    @property
    def classes_found(self) -> int:
        """Classes with at least one sample in a hundred."""
        return sum(count >= FOUND_SHARE * self.samples for count in self.class_counts)

    @property
    def largest_share(self) -> float:
        """The share of the most frequent class."""
        return max(self.class_counts) / self.samples

    @property
    def varied(self) -> bool:
        """Whether at least 8 classes are found and none has more than 30 % of the samples."""
        return self.classes_found >= MIN_CLASSES and self.largest_share <= MAX_SHARE

    @property
    def original(self) -> bool:
        """Whether samples keep as far from the training digits as unseen real ones, by the first percentile."""
        return self.distance_first_percentile >= self.distance_first_percentile_real

    @property
    def lifelike(self) -> bool:
        """Whether samples lie near the training digits, by the median: unseen real ones at 1, uniform noise at 3.4."""
        return self.distance_median <= MAX_DISTANCE_RATIO * self.distance_median_real

    @property
    def passed(self) -> bool:
        return self.varied and self.original and self.lifelike

    def explain(self) -> str:
        """The numbers in plain words, with what is asked of each."""
        counts = ", ".join(f"{digit}: {count}" for digit, count in enumerate(self.class_counts))
        limit = MAX_DISTANCE_RATIO * self.distance_median_real
        sure, sure_real = self.confident_share, self.confident_share_real
        return f"""
classes     {self.classes_found} of {CLASSES} are found among {self.samples} samples ({counts}).
            The most frequent has {self.largest_share:.0%}. Asked: {MIN_CLASSES} found, none above {MAX_SHARE:.0%}.
            The judge is a classifier that is {self.accuracy:.1%} right on real digits it has never seen.
confidence  The judge is sure of {sure:.0%} of samples, and of {sure_real:.0%} of real digits.
likeness    From a typical sample the nearest training digit is {self.distance_median:.2f} away;
            from an unseen real digit {self.distance_median_real:.2f}, from noise 7. Asked: at most {limit:.2f}.
no copies   The closest hundredth of samples comes within {self.distance_first_percentile:.2f} of a training digit;
            of unseen real digits within {self.distance_first_percentile_real:.2f}. Asked: no closer.
All that is asked for was {"reached" if self.passed else "NOT reached"}.""".lstrip()

    def to_json(self) -> dict[str, Any]:
        derived = ("classes_found", "largest_share", "varied", "original", "lifelike", "passed")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def evaluate_digits(samples: Tensor) -> DigitsEvaluation:
    """Judges samples (N, 1, 8, 8) of scikit-learn's handwritten digits, in [-1, 1], N >= 1.

    The classifier is a logistic regression on Gaussian kernel features, fitted in seconds to the train split of
    `fastebm.data.digits`. It is sure of 96 % of held-out digits, but of no uniform noise and a third of means of two
    digits, which a support vector machine with calibrated probabilities is not.

    Raises ValueError for other shapes or values that are not finite, and RuntimeError where the classifier is less
    than 97 % right on the held-out digits: its opinion would be worth nothing.
    """
    if samples.ndim != 4 or samples.shape[1:] != (1, 8, 8) or not len(samples) or not samples.isfinite().all():
        raise ValueError(f"samples must be finite and (N, 1, 8, 8) with N >= 1, got {tuple(samples.shape)}")
    samples = samples.cpu()
    train, train_labels = digits("train")
    real, real_labels = digits("test")
    classify = _classifier(train, train_labels)
    real_classes, real_confidence = classify(real)
    accuracy = float((real_classes == real_labels).float().mean())
    if accuracy < MIN_ACCURACY:
        raise RuntimeError(f"the judge is {accuracy:.1%} right on held-out digits, less than {MIN_ACCURACY:.0%}")
    classes, confidence = classify(samples)
    distances, real_distances = nearest_distances(samples, train), nearest_distances(real, train)
    return DigitsEvaluation(
        samples=len(samples),
        accuracy=accuracy,
        class_counts=tuple(torch.bincount(classes, minlength=CLASSES).tolist()),
        confident_share=float((confidence >= CONFIDENT).float().mean()),
        confident_share_real=float((real_confidence >= CONFIDENT).float().mean()),
        distance_median=float(distances.median()),
        distance_first_percentile=float(distances.quantile(0.01)),
        distance_median_real=float(real_distances.median()),
        distance_first_percentile_real=float(real_distances.quantile(0.01)),
    )


def _classifier(images: Tensor, labels: Tensor) -> Any:
    """A function from images to (classes, probabilities of those classes), trained on the given ones."""
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    kernel = Nystroem(gamma=0.04, n_components=600, random_state=0)
    machine = make_pipeline(kernel, LogisticRegression(C=100.0, max_iter=2000))
    machine.fit(images.flatten(1).numpy(), labels.numpy())

    def classify(given: Tensor) -> tuple[Tensor, Tensor]:
        confidence, classes = torch.from_numpy(machine.predict_proba(given.flatten(1).numpy())).max(dim=1)
        return torch.from_numpy(machine.classes_)[classes], confidence

    return classify
