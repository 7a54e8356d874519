"""All that an evaluation found, as JSON and as a table in plain words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastebm.evaluation.calibration_metrics import CalibrationMetrics
from fastebm.evaluation.energy_metrics import ACCEPTANCE_COUNT, EnergyMetrics
from fastebm.evaluation.metrics.classifier import Classes, EvaluationResult, Nearest
from fastebm.evaluation.metrics.comparison import Comparison, RealImages
from fastebm.evaluation.metrics.distances import FeatureStatistics, frechet_distance
from fastebm.evaluation.metrics.features import NOT_COMPARABLE, FeatureClassifier
from fastebm.evaluation.metrics.inception import InceptionMetrics

_NAME = 36


@dataclass(frozen=True)
class LongRunFeatures:
    """What becomes of samples when chains go on from them, in the features of a classifier.

    Attributes:
        count: chains that are still finite.
        frechet_start, frechet_end: distances from as many real images as chains began. NOT comparable to published
            FID.
        floor: the distance of as many unseen real images from those; None where there are fewer.
        found_start, found_end: classes found; None for a classifier of rotations.
        confident_start, confident_end: shares with a class probability of at least 0.9.
    """

    count: int
    frechet_start: float
    frechet_end: float
    floor: float | None
    found_start: int | None
    found_end: int | None
    confident_start: float
    confident_end: float

    @classmethod
    def of(cls, start: Tensor, end: Tensor, real: RealImages, classifier: FeatureClassifier) -> LongRunFeatures | None:
        """That of samples and the images they became; None where fewer than 2 are finite."""
        if len(end) < 2:
            return None
        reference = FeatureStatistics.of(classifier(real.reference(len(start))).features)
        unseen, _ = real.unseen(len(start))
        before, after = classifier(start), classifier(end)
        classes = Classes.of(classifier.classes, after.probabilities, before.probabilities)
        named = classifier.task == "classes"
        return cls(
            len(end),
            frechet_distance(before.features, reference),
            frechet_distance(after.features, reference),
            frechet_distance(classifier(unseen).features, reference) if len(unseen) == len(start) else None,
            classes.found_real if named else None,
            classes.found if named else None,
            classes.confident_share_real,
            classes.confident_share,
        )


@dataclass(frozen=True)
class Report:
    """What was evaluated against what, and each part that was asked for."""

    samples: str
    real: str
    nearest: Nearest | None = None
    features: dict[str, Any] | None = None
    verdict: EvaluationResult | None = None
    inception: InceptionMetrics | None = None
    statistics: dict[str, Any] | None = None
    health: EnergyMetrics | CalibrationMetrics | None = None
    survival: LongRunFeatures | None = None

    def to_json(self) -> dict[str, Any]:
        """What evaluation.json holds. Infinite and undefined numbers become null."""
        calibrated = isinstance(self.health, CalibrationMetrics)
        parts = {
            "samples": self.samples,
            "real": self.real,
            "nearest": self.nearest and dataclasses.asdict(self.nearest),
            "features": self.features,
            "in_features": self.verdict and self.verdict.to_json(),
            "inception": self.inception and self.inception.to_json(),
            "statistics": self.statistics,
            "calibration" if calibrated else "health": self.health and self.health.to_json(),
            f"{'short' if calibrated else 'long'}_chains_in_features": self.survival
            and {"note": NOT_COMPARABLE, **dataclasses.asdict(self.survival)},
        }
        return {name: _finite(part) for name, part in parts.items() if part is not None}

    def explain(self) -> str:
        """The same for people."""
        lines = [f"samples: {self.samples}", f"real: {self.real}"]
        for part in (self._inception(), self._statistics(), self._features(), self._nearest(), self._health()):
            if text := list(part):
                lines += ["", *text]
        return "\n".join(lines)

    def _inception(self) -> Iterator[str]:
        if self.inception is not None:
            found = self.inception
            yield f"Inception ({found.weights}): Fréchet distance is FID, kernel distance is KID"
            yield from _table(found.comparison)
            yield (
                f"Inception score {found.score:.2f} (deviation {found.score_std:.2f}); of real images "
                f"{found.score_real:.2f}"
            )

    def _statistics(self) -> Iterator[str]:
        if self.statistics is not None:
            found = self.statistics
            yield f"{found['kind']} from the statistics in {found['path']}: {_number(found['frechet'])}"
            yield f"of {found['count']:,} samples, in the features of {found['features']}"
            yield f"ceiling: {_number(found['noise'])}, of as much uniform noise; no floor, for which images are needed"
            if not found["labelled"]:
                yield "which features the statistics are of, their file does not say"

    def _features(self) -> Iterator[str]:
        if self.verdict is None or self.features is None:
            return
        found, classes = self.verdict, self.verdict.classes
        yield f"Features of a small classifier trained on the data: {NOT_COMPARABLE}"
        yield from _table(found.comparison)
        of = "classes" if classes is not None else "rotations"
        held_out = f"{self.features['held_out']:,} held-out images"
        yield f"The classifier names {of} of {found.accuracy:.1%} of {held_out} rightly."
        if classes is not None:
            yield ""
            yield f"{'what the classifier sees':{_NAME}} {'samples':>9} {'real':>9}"
            yield f"{f'classes found, of {len(classes.names)}':{_NAME}} {classes.found:9} {classes.found_real:9}"
            shares = classes.largest_share, classes.largest_share_real
            yield f"{'share of the most frequent':{_NAME}} {shares[0]:9.1%} {shares[1]:9.1%}"
            even = f"entropy of classes (even: {math.log(len(classes.names)):.2f})"
            yield f"{even:{_NAME}} {classes.entropy:9.2f} {classes.entropy_real:9.2f}"
            sure = classes.confident_share, classes.confident_share_real
            yield f"{'share it is sure of (0.9 or more)':{_NAME}} {sure[0]:9.1%} {sure[1]:9.1%}"

    def _nearest(self) -> Iterator[str]:
        if self.nearest is not None:
            found = self.nearest
            yield f"{f'nearest of {found.reference:,} train images':{_NAME}} {'samples':>9} {'unseen':>9}"
            yield f"{'median distance':{_NAME}} {found.median:9.3f} {found.median_real:9.3f}"
            percentiles = found.first_percentile, found.first_percentile_real
            yield f"{'first percentile (copies are near 0)':{_NAME}} {percentiles[0]:9.3f} {percentiles[1]:9.3f}"

    def _health(self) -> Iterator[str]:
        if isinstance(self.health, CalibrationMetrics):
            yield from _calibration_lines(self.health)
        elif self.health is not None:
            yield from _health_lines(self.health)
        if self.survival is not None:
            after = self.survival
            classes = "" if after.found_end is None else f"; classes found {after.found_start} -> {after.found_end}"
            floor = "" if after.floor is None else f", floor {_number(after.floor)}"
            yield (
                f"Fréchet distance of {after.count} samples {_number(after.frechet_start)} -> "
                f"{_number(after.frechet_end)}{floor} ({NOT_COMPARABLE}); sure of {after.confident_start:.0%} -> "
                f"{after.confident_end:.0%}{classes}"
            )


def _health_lines(found: EnergyMetrics) -> Iterator[str]:
    long = found.long
    yield f"health of the energy, {found.count:,} images"
    yield _energies(found)
    if found.acceptance_samples is None or found.acceptance_data is None:
        yield "Metropolis acceptance: none, the last level has no noise"
    else:
        yield (
            f"Metropolis acceptance of an update at temperature {found.temperature:.2g}: from samples "
            f"{found.acceptance_samples:.1%}, from real images {found.acceptance_data:.1%} (of {ACCEPTANCE_COUNT})"
        )
    yield (
        f"{long.num_steps} more steps: {long.finite_share:.0%} of chains stay finite, energy {long.energy_start:.3f} "
        f"-> {long.energy_end:.3f}, pixels move by {long.motion:.4f} on average"
    )


def _calibration_lines(found: CalibrationMetrics) -> Iterator[str]:
    yield f"what the energy has left to calibrate, {found.count:,} images"
    yield _energies(found)
    if found.energy_ends is None or found.gap_ends is None or found.distance is None:
        yield f"chains of {found.num_steps} steps from samples: not all stay finite"
        return
    yield (
        f"chains of {found.num_steps} steps from samples: energy {found.energy_samples:.3f} -> {found.energy_ends:.3f}, "
        f"gap {found.gap_ends:+.3f}, squared distance {_number(found.distance)} (of noise alone "
        f"{_number(found.noise_floor)})"
    )


def _energies(found: EnergyMetrics | CalibrationMetrics) -> str:
    return (
        f"mean energy: real {found.energy_data:.3f} (deviation {found.energy_data_std:.3f}), samples "
        f"{found.energy_samples:.3f}, gap {found.gap:+.3f}"
    )


def _table(comparison: Comparison) -> Iterator[str]:
    yield f"{'':{_NAME}} {'count':>7} {'of real':>7} {'Fréchet':>9} {'kernel':>20} {'precision':>9} {'recall':>7}"
    for name, row in comparison.rows():
        kernel = f"{_number(row.kernel)} ± {_number(row.kernel_std)}"
        shares = f"{row.precision:9.3f} {row.recall:7.3f}"
        yield f"{name:{_NAME}} {row.count:7,} {row.reference:7,} {_number(row.frechet):>9} {kernel:>20} {shares}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _finite(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _finite(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [_finite(value) for value in part]
    return None if isinstance(part, float) and not math.isfinite(part) else part
