"""A run as a detector of outliers: its scores on images of its own kind, on others, and what tells them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastebm.data import ImagePyramid, Images, batches
from fastebm.models import CoarseToFineEnergy
from fastebm.sampling.cascade import device_of
from fastebm.tasks.detection.level_statistics import LevelStatistics
from fastebm.tasks.detection.outlier_sets import constant_colours, flipped, interpolations, rotated, uniform_noise
from fastebm.tasks.detection.scores import DetectionMetrics, Scores, detection_metrics, outlier_scores
from fastebm.training import CoarseToFineRun
from fastebm.training.coarse_to_fine.run import new_net

IN_DISTRIBUTION = "in_distribution"
SYNTHETIC = ("uniform_noise", "constant_colours", "interpolations", "rotated", "flipped")
FEWEST_TRAINING = 1000  # images for the statistics, however few are to be scored


@dataclass(frozen=True)
class DetectionResult:
    """What a run says of several sets; "in_distribution" is the first of them.

    Attributes:
        sets: the images that were scored, by the set's name, in the order of their scores.
        scores: of each set, as `outlier_scores` gives them.
        metrics: of each set but the first, by the name of the score.
        levels: what the run's energies are on training images.
    """

    run: CoarseToFineRun
    sets: dict[str, Images]
    scores: dict[str, Scores]
    metrics: dict[str, dict[str, DetectionMetrics]]
    levels: LevelStatistics

    def to_json(self) -> dict[str, Any]:
        """Everything but the scores themselves."""
        sets = {
            name: {"images": str(images), "scores": {score: _summary(values) for score, values in scores.items()}}
            for (name, images), scores in zip(self.sets.items(), self.scores.values(), strict=True)
        }
        metrics = {
            name: {score: dataclasses.asdict(numbers) for score, numbers in by_score.items()}
            for name, by_score in self.metrics.items()
        }
        run = {"path": str(self.run.path), "iteration": self.run.iteration, "size": self.run.size}
        training = {
            "count": self.levels.count,
            "mean_energy": self.levels.mean_energies,
            "std_energy": self.levels.energy_deviations,
        }
        return {"run": run, "training": training, "sets": sets, "metrics": metrics}


def detect_outliers(
    run: CoarseToFineRun,
    training: Images,
    images: Images,
    against: Mapping[str, Images] | None = None,
    *,
    count: int = 10_000,
    seed: int = 0,
    batch_size: int = 256,
    dtype: torch.dtype | None = torch.float32,
    engine: str = "auto",
    progress: bool = False,
) -> DetectionResult:
    """Scores `images` and sets of outliers, and says how well each score tells them apart.

    Always among the outliers are uniform noise, constant colours, means of two of `images`, and those of them that are
    scored, turned by 90 degrees and mirrored.

    Args:
        training: images that the run learned from, from whose energies typicality is measured, and on which alone the
            statistics of the levels are fitted: on `count` of them, or 1,000 if that is more.
        images: of the same kind, unseen in training.
        against: sets of outliers by name.
        count: how many of each set are scored at most, chosen at random; and how many of each synthetic set.
        seed: of that choice, and of the synthetic sets.
        batch_size, dtype, engine, progress: as in `outlier_scores`.

    Images have the run's size or a multiple of it by a power of two, from which they are averaged down as in training.

    Raises ValueError, naming the set, for images of other sizes or colours; else as `outlier_scores`.
    """
    against = dict(against or {})
    if taken := {IN_DISTRIBUTION, *SYNTHETIC} & against.keys():
        raise ValueError(f"{', '.join(sorted(taken))}: such a set is always there; choose another name")
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for name, given in {"training": training, IN_DISTRIBUTION: images, **against}.items():
        _check_fit(run, name, given)
    sets = {IN_DISTRIBUTION: _some(images, count, seed)}
    sets |= {name: _some(given, count, seed) for name, given in against.items()}
    shape = (run.config.channels, run.size)
    sets["uniform_noise"] = uniform_noise(count, *shape, seed=seed)
    sets["constant_colours"] = constant_colours(count, *shape, seed=seed)
    sets["interpolations"] = interpolations(images, count, seed=seed)
    sets["rotated"] = rotated(sets[IN_DISTRIBUTION])
    sets["flipped"] = flipped(sets[IN_DISTRIBUTION])

    options: dict[str, Any] = {"device": device_of(run.levels[run.size]), "progress": progress}
    learned = _some(training, max(count, FEWEST_TRAINING), seed)
    levels, untrained = (
        LevelStatistics.fit(energies, _batches(learned, run.size, batch_size), dtype=dtype, engine=engine, **options)
        for energies in (run.levels, _untrained_levels(run))
    )
    scores = {
        name: outlier_scores(
            levels.highest,
            _batches(given, run.size, batch_size),
            training_mean=levels.mean_energies[run.size],
            levels=levels,
            untrained=untrained.highest,
            untrained_levels=untrained,
            **options,
        )
        for name, given in sets.items()
    }
    metrics = {
        name: {score: detection_metrics(scores[IN_DISTRIBUTION][score], values) for score, values in by_score.items()}
        for name, by_score in scores.items()
        if name != IN_DISTRIBUTION
    }
    return DetectionResult(run, sets, scores, metrics, levels)


def _untrained_levels(run: CoarseToFineRun) -> dict[int, CoarseToFineEnergy]:
    """A net with the run's settings and its first weights, at each of its levels."""
    net = new_net(run.config)
    device = device_of(run.levels[run.size])
    return {size: net.frozen(size).to(device) for size in run.levels}


def _check_fit(run: CoarseToFineRun, name: str, images: Images) -> None:
    """Raises ValueError for images that the run's energy does not take, at once or averaged down."""
    channels, height, width = images.pixels.shape[1:]
    wanted = run.config.channels
    if channels != wanted:
        raise ValueError(f"{name}: its images have {channels} channels, and those of the run {wanted}")
    factor, rest = divmod(height, run.size)
    if height != width or rest or factor & (factor - 1):
        raise ValueError(
            f"{name}: its images are {height}x{width}, and the run takes {run.size}x{run.size}, or that times a power "
            "of two"
        )


def _some(images: Images, count: int, seed: int) -> Images:
    """At most `count` of the images, at random but in their order: the first ones may all be of one class."""
    if len(images) <= count:
        return images
    chosen = next(batches(images, count, seed)).sort().values
    return dataclasses.replace(images, pixels=images.select_pixels(chosen), labels=None)


def _batches(images: Images, size: int, batch_size: int) -> Iterator[Tensor]:
    levels = ImagePyramid(images, size)
    for indices in torch.arange(len(images)).split(batch_size):
        yield levels.batch(size, indices)


def _summary(values: NDArray[np.float32]) -> dict[str, float]:
    exact = values.astype(np.float64)
    return {"mean": float(exact.mean()), "std": float(exact.std()), "count": len(values)}
