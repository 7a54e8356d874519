"""The report of an evaluation: all metrics together, as JSON and as tables for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastebm.evaluation.calibration_metrics import CalibrationMetrics
from fastebm.evaluation.energy_metrics import ACCEPTANCE_COUNT, EnergyMetrics
from fastebm.evaluation.evaluate import CONFIDENT, EvaluationResult, PredictedClasses
from fastebm.evaluation.metrics.comparison import Comparison, RealImages
from fastebm.evaluation.metrics.features import NOT_COMPARABLE, FeatureClassifier
from fastebm.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from fastebm.evaluation.metrics.inception import InceptionMetrics
from fastebm.evaluation.metrics.nearest_neighbors import NearestDistances
from fastebm.runs.files import finite_json

_NAME = 36


@dataclass(frozen=True)
class LongRunFeatures:
    """How samples change in a classifier's features when their chains continue.

    Attributes:
        count: chains that are still finite.
        frechet_start, frechet_end: distances from as many real images as there are chains. NOT comparable to published
            FID.
        reference: the distance of as many held-out real images; None where there are fewer.
        found_start, found_end: classes found; None for a classifier of rotations.
        confident_start, confident_end: shares with a class probability of at least 0.9.
    """

    count: int
    frechet_start: float
    frechet_end: float
    reference: float | None
    found_start: int | None
    found_end: int | None
    confident_start: float
    confident_end: float

    @classmethod
    def of(cls, start: Tensor, end: Tensor, real: RealImages, classifier: FeatureClassifier) -> LongRunFeatures | None:
        """That of samples and of the ends of their chains; None where fewer than 2 are finite."""
        if len(end) < 2:
            return None
        statistics = FeatureStatistics.of(classifier(real.subset(len(start))).features)
        held_out, _ = real.held_out(len(start))
        enough = len(held_out) == len(start)
        before, after = classifier(start), classifier(end)
        classes = PredictedClasses.of(classifier.classes, after.probabilities, before.probabilities)
        has_classes = classifier.task == "classes"
        return cls(
            len(end),
            frechet_distance(before.features, statistics),
            frechet_distance(after.features, statistics),
            frechet_distance(classifier(held_out).features, statistics) if enough else None,
            classes.found_real if has_classes else None,
            classes.found if has_classes else None,
            classes.confident_share_real,
            classes.confident_share,
        )


@dataclass(frozen=True)
class Report:
    """All parts of an evaluation; parts that were not asked for are None.

    Attributes:
        samples, real: what was evaluated and compared with, in words.
        nearest: distances to the nearest train images.
        features: metadata of the small classifier.
        result: metrics by the small classifier.
        inception: metrics in Inception's features.
        statistics: the Fréchet distance from stored statistics, and of what.
        energy_metrics: metrics of the run's energy.
        long_run: how samples change in the classifier's features when their chains continue.
    """

    samples: str
    real: str
    nearest: NearestDistances | None = None
    features: dict[str, Any] | None = None
    result: EvaluationResult | None = None
    inception: InceptionMetrics | None = None
    statistics: dict[str, Any] | None = None
    energy_metrics: EnergyMetrics | CalibrationMetrics | None = None
    long_run: LongRunFeatures | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of evaluation.json. Numbers that are infinite or NaN become null."""
        calibrated = isinstance(self.energy_metrics, CalibrationMetrics)
        parts = {
            "samples": self.samples,
            "real": self.real,
            "nearest": self.nearest and dataclasses.asdict(self.nearest),
            "features": self.features,
            "in_features": self.result and self.result.to_json(),
            "inception": self.inception and self.inception.to_json(),
            "statistics": self.statistics,
            f"{'calibration' if calibrated else 'energy'}_metrics": self.energy_metrics
            and self.energy_metrics.to_json(),
            f"{'short' if calibrated else 'long'}_chains_in_features": self.long_run
            and {"note": NOT_COMPARABLE, **dataclasses.asdict(self.long_run)},
        }
        return {name: finite_json(part) for name, part in parts.items() if part is not None}

    def explain(self) -> str:
        """All parts as tables and sentences."""
        lines = [f"samples: {self.samples}", f"real: {self.real}"]
        for part in (self._inception(), self._statistics(), self._features(), self._nearest(), self._energy()):
            if text := list(part):
                lines += ["", *text]
        return "\n".join(lines)

    def _inception(self) -> Iterator[str]:
        if (metrics := self.inception) is not None:
            yield f"Inception ({metrics.weights}): Fréchet distance is FID, kernel distance is KID"
            yield from _table(metrics.comparison)
            yield (
                f"Inception score {metrics.score:.2f} (deviation {metrics.score_std:.2f}); of real images "
                f"{metrics.score_real:.2f}"
            )

    def _statistics(self) -> Iterator[str]:
        if (metrics := self.statistics) is not None:
            yield f"{metrics['kind']} from the statistics in {metrics['path']}: {_number(metrics['frechet'])}"
            yield f"of {metrics['count']:,} samples, in the features of {metrics['features']}"
            yield f"uniform noise: {_number(metrics['noise'])}; a reference of real images needs images, not statistics"
            if not metrics["labelled"]:
                yield "the file of statistics does not say which features they are of"

    def _features(self) -> Iterator[str]:
        if self.result is None or self.features is None:
            return
        classes = self.result.classes
        yield f"Features of a small classifier trained on the data: {NOT_COMPARABLE}"
        if self.result.comparison is not None:
            yield from _table(self.result.comparison)
        of = "classes" if classes is not None else "rotations"
        yield f"Its accuracy for {of} is {self.result.accuracy:.1%} of {self.features['held_out']:,} held-out images."
        if classes is not None:
            yield ""
            yield _row("predicted classes", "samples", "real")
            yield _row(f"classes found, of {len(classes.names)}", f"{classes.found}", f"{classes.found_real}")
            shares = classes.largest_share, classes.largest_share_real
            yield _row("share of the most frequent", *(f"{share:.1%}" for share in shares))
            entropies = classes.entropy, classes.entropy_real
            name = f"entropy of classes (even: {math.log(len(classes.names)):.2f})"
            yield _row(name, *(f"{entropy:.2f}" for entropy in entropies))
            confident = classes.confident_share, classes.confident_share_real
            yield _row(f"share with confidence >= {CONFIDENT}", *(f"{share:.1%}" for share in confident))

    def _nearest(self) -> Iterator[str]:
        if (nearest := self.nearest) is not None:
            yield _row(f"nearest of {nearest.num_reference:,} train images", "samples", "held out")
            yield _row("median distance", f"{nearest.median:.3f}", f"{nearest.median_real:.3f}")
            percentiles = nearest.first_percentile, nearest.first_percentile_real
            yield _row("first percentile (copies are near 0)", *(f"{value:.3f}" for value in percentiles))

    def _energy(self) -> Iterator[str]:
        if (metrics := self.energy_metrics) is not None:
            calibrated = isinstance(metrics, CalibrationMetrics)
            yield f"energy, {metrics.count:,} images"
            yield (
                f"mean energy: real {metrics.energy_data:.3f} (deviation {metrics.energy_data_std:.3f}), samples "
                f"{metrics.energy_samples:.3f}, gap {metrics.gap:+.3f}"
            )
            yield from _calibration_lines(metrics) if calibrated else _chain_lines(metrics)  # type: ignore[arg-type]
        if (after := self.long_run) is not None:
            classes = "" if after.found_end is None else f"; classes found {after.found_start} -> {after.found_end}"
            reference = "" if after.reference is None else f", reference {_number(after.reference)}"
            yield (
                f"Fréchet distance of {after.count} samples {_number(after.frechet_start)} -> "
                f"{_number(after.frechet_end)}{reference} ({NOT_COMPARABLE}); confident {after.confident_start:.0%} -> "
                f"{after.confident_end:.0%}{classes}"
            )


def _chain_lines(metrics: EnergyMetrics) -> Iterator[str]:
    long_run = metrics.long_run
    if metrics.acceptance_samples is None or metrics.acceptance_data is None:
        yield "Metropolis acceptance: none, the last level has no noise"
    else:
        yield (
            f"Metropolis acceptance of an update at temperature {metrics.temperature:.2g}: from samples "
            f"{metrics.acceptance_samples:.1%}, from real images {metrics.acceptance_data:.1%} (of {ACCEPTANCE_COUNT})"
        )
    yield (
        f"{long_run.num_steps} more steps: {long_run.finite_share:.0%} of chains stay finite, energy "
        f"{long_run.energy_start:.3f} -> {long_run.energy_end:.3f}, mean change of a pixel {long_run.motion:.4f}"
    )


def _calibration_lines(metrics: CalibrationMetrics) -> Iterator[str]:
    if metrics.energy_ends is None or metrics.gap_ends is None or metrics.distance is None:
        yield f"chains of {metrics.num_steps} steps from samples: not all stay finite"
        return
    yield (
        f"chains of {metrics.num_steps} steps from samples: energy {metrics.energy_samples:.3f} -> "
        f"{metrics.energy_ends:.3f}, gap {metrics.gap_ends:+.3f}, squared distance {_number(metrics.distance)} (of "
        f"noise alone {_number(metrics.noise_floor)})"
    )


def _table(comparison: Comparison) -> Iterator[str]:
    yield f"{'':{_NAME}} {'count':>7} {'of real':>7} {'Fréchet':>9} {'kernel':>20} {'precision':>9} {'recall':>7}"
    for name, row in comparison.rows():
        kernel = _number(row.kernel)
        if row.kernel_std > 1e-9 * abs(row.kernel):  # of one subset there is none but rounding
            kernel += f" ± {_number(row.kernel_std)}"
        shares = f"{row.precision:9.3f} {row.recall:7.3f}"
        yield f"{name:{_NAME}} {row.count:7,} {row.num_reference:7,} {_number(row.frechet):>9} {kernel:>20} {shares}"


def _row(name: str, samples: str, real: str) -> str:
    return f"{name:{_NAME}} {samples:>9} {real:>9}"


def _number(value: float) -> str:
    return f"{value:.4g}"
