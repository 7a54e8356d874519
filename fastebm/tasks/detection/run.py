"""`detect_outliers`: scores inliers and outlier sets by a run or an energy, and computes AUROC, AUPR and FPR@95."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastebm import plotting
from fastebm.compiler import EnergyGradient
from fastebm.data import Images, batches
from fastebm.runs.nets import initialized
from fastebm.sampling.cascade import device_of
from fastebm.tasks.arguments import check_seed, check_whole
from fastebm.tasks.detection.batches import AtSize, Energy, Model, energy_of
from fastebm.tasks.detection.level_statistics import LevelStatistics
from fastebm.tasks.detection.outlier_sets import constant_colours, flip, interpolations, rotate, uniform_noise
from fastebm.tasks.detection.scores import DetectionMetrics, Scores, detection_metrics, outlier_scores, roc_curve
from fastebm.training import CoarseToFineRun, Run, load
from fastebm.training.coarse_to_fine.run import new_net

IN_DISTRIBUTION = "in_distribution"
SYNTHETIC = ("uniform_noise", "constant_colours", "interpolations", "rotated", "flipped")
MIN_TRAINING = 1000  # images for the statistics, however few are to be scored
RANKED = 2 * plotting.RANKED_COLUMNS


@dataclass(frozen=True)
class DetectionResult:
    """Scores and metrics of several sets; "in_distribution" is the first of them.

    Attributes:
        run: the run whose energies score; None for a bare energy.
        sets: the images that were scored, by name of the set, in the order of their scores.
        scores: `outlier_scores` of each set.
        metrics: how well each score separates each set from the first, by set and by name of the score.
        levels: statistics of the energies over training images.
    """

    run: Run | None
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
        run = self.run and {"path": str(self.run.path), "iteration": self.run.iteration, "size": self.run.size}
        training = {
            "count": self.levels.count,
            "mean_energy": self.levels.mean_energies,
            "std_energy": self.levels.energy_deviations,
        }
        return {"run": run, "training": training, "sets": sets, "metrics": metrics}

    def save_figures(self, folder: Path) -> None:
        """Writes histogram.png, roc.png, and typical.png: the most and least typical images by "level_typicality"."""
        plotting.save_histograms(folder / "histogram.png", self.scores)
        inside = self.scores[IN_DISTRIBUTION]
        curves = {
            score: {
                name: (*roc_curve(values, self.scores[name][score]), metrics[score].auroc)
                for name, metrics in self.metrics.items()
            }
            for score, values in inside.items()
        }
        plotting.save_roc(folder / "roc.png", curves)
        plotting.save_ranked(folder / "typical.png", {name: self._extremes(name) for name in self.sets})

    def _extremes(self, name: str) -> list[tuple[str, Tensor]]:
        """The most and the least typical images of a set, under titles."""
        distances = self.scores[name]["level_typicality"]
        order = np.argsort(distances, kind="stable")
        panels = []
        for title, indices in (("most", order[:RANKED]), ("least", order[::-1][:RANKED])):
            low, high = distances[indices].min(), distances[indices].max()
            images = self.sets[name].batch(torch.from_numpy(indices.copy()))
            panels.append((f"{title} typical, {low:.2g} to {high:.2g}", images))
        return panels


def detect_outliers(
    model: Model,
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
    """Scores `images` and sets of outliers, and measures how well each score separates them.

    Five sets of outliers are always included: uniform noise, constant colours, means of two of `images`, and the scored
    `images` rotated by 90 degrees and mirrored.

    Args:
        model: a run, its folder, or an energy. Levels and the untrained baseline exist for a coarse-to-fine run only;
            any other energy is a single level.
        training: images that the model was trained on. The statistics of the levels and the mean energy are computed
            from `count` of them, or from 1,000 if that is more.
        images: images of the same kind, not used in training.
        against: sets of outliers by name.
        count: the most images that are scored of a set, chosen at random, and the size of each synthetic set.
        seed: of that choice and of the synthetic sets.
        batch_size, dtype, engine, progress: as in `outlier_scores`.

    Images have the run's size (without a run, that of `images`) or that size times a power of two; larger ones are
    averaged down as in training.

    Raises ValueError, naming the set, for images of other sizes or colours, TypeError for what is no `Images`, and as
    `outlier_scores` does.
    """
    import sklearn.metrics  # noqa: F401  (if it is missing, that is an error before the scoring)

    against = dict(against or {})
    if reserved := {IN_DISTRIBUTION, *SYNTHETIC} & against.keys():
        raise ValueError(f"{', '.join(sorted(reserved))}: such a set is always there; choose another name")
    count, batch_size = check_whole("count", count, 2), check_whole("batch_size", batch_size)
    check_seed(seed)
    given_sets = {"training": training, IN_DISTRIBUTION: images, **against}
    for name, given in given_sets.items():
        if not isinstance(given, Images):
            raise TypeError(
                f"{name}: Images are needed, as fastebm.data.open_images gives them, got {type(given).__name__}"
            )
    if isinstance(model, str | Path):
        model = load(model)
    run = model if isinstance(model, Run) else None
    channels, size = (images.channels, images.size) if run is None else (run.config.channels, run.size)
    for name, given in given_sets.items():
        _check_format(name, given, channels, size)
    sets = {name: _subset(given, count, seed) for name, given in {IN_DISTRIBUTION: images, **against}.items()}
    sets["uniform_noise"] = uniform_noise(count, channels, size, seed=seed)
    sets["constant_colours"] = constant_colours(count, channels, size, seed=seed)
    sets["interpolations"] = interpolations(images, count, seed=seed)
    sets["rotated"] = rotate(sets[IN_DISTRIBUTION])
    sets["flipped"] = flip(sets[IN_DISTRIBUTION])

    energies: Mapping[int, Energy | EnergyGradient] = {size: energy_of(model)}
    device = device_of(energies[size])
    options: dict[str, Any] = {"device": device, "batch_size": batch_size}

    def bar(name: str) -> str | bool:
        return progress and name.replace("_", " ")

    for_statistics = _subset(training, max(count, MIN_TRAINING), seed)

    def statistics(levels: Mapping[int, Energy | EnergyGradient], name: str) -> LevelStatistics:
        return LevelStatistics.fit(
            levels,
            AtSize(for_statistics, size),
            batch_size=batch_size,
            dtype=dtype,
            engine=engine,
            device=device,
            progress=bar(name),
        )

    if isinstance(run, CoarseToFineRun):
        levels, untrained = (
            statistics(run.levels, "training"),
            statistics(_untrained_levels(run, device), "training, untrained"),
        )
        options |= {"untrained": untrained.highest, "untrained_levels": untrained}
    else:
        levels = statistics(energies, "training")
    options |= {"levels": levels, "training_mean": levels.mean_energies[size]}
    scores = {
        name: outlier_scores(levels.highest, AtSize(given, size), progress=bar(name), **options)
        for name, given in sets.items()
    }
    metrics = {
        name: {score: detection_metrics(scores[IN_DISTRIBUTION][score], values) for score, values in by_score.items()}
        for name, by_score in scores.items()
        if name != IN_DISTRIBUTION
    }
    return DetectionResult(run, sets, scores, metrics, levels)


def _untrained_levels(run: CoarseToFineRun, device: torch.device) -> dict[int, Callable[[Tensor], Tensor]]:
    """A net with the run's config and its first weights, at each of its levels."""
    net = initialized(lambda: new_net(run.config), "cpu")
    return {size: net.frozen(size).to(device) for size in run.levels}


def _check_format(name: str, images: Images, channels: int, size: int) -> None:
    """Raises ValueError for images that can't be averaged down to (channels, size, size)."""
    if images.channels != channels:
        raise ValueError(f"{name}: its images have {images.channels} channels, and those of the run {channels}")
    height, width = images.pixels.shape[2:]
    factor, rest = divmod(height, size)
    if height != width or rest or factor & (factor - 1):
        raise ValueError(
            f"{name}: its images are {height}x{width}, and the run takes {size}x{size}, or that times a power of two"
        )


def _subset(images: Images, count: int, seed: int) -> Images:
    """At most `count` of the images, chosen at random (the first ones may all be of one class), in the set's order."""
    if len(images) <= count:
        return images
    chosen = next(batches(images, count, seed)).sort().values
    return dataclasses.replace(images, pixels=images.select_pixels(chosen), labels=None)


def _summary(values: NDArray[np.float32]) -> dict[str, float]:
    exact = values.astype(np.float64)
    return {"mean": float(exact.mean()), "std": float(exact.std()), "count": len(values)}
