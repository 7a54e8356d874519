"""Outlier scores of images by energy, and metrics of how well a score separates two sets.

The scores come from

- Du and Mordatch, "Implicit Generation and Modeling with Energy-Based Models" (NeurIPS 2019): the energy;
- Grathwohl et al., "Your Classifier is Secretly an Energy Based Model" (ICLR 2020): the norm of its gradient;
- Nalisnick et al., "Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality" (2019): the
  distance from the mean energy of training images;
- Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks" (NeurIPS
  2018): the Mahalanobis distance in features of a net, with their covariance over training images;
- Bergamin et al., "Model-agnostic out-of-distribution detection using combined statistical tests" (AISTATS 2022): a
  test of typicality and one of the gradient, combined by Fisher's method.

Two baselines show what needs no training: the total variation of an image, and the scores of an untrained net.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastebm.compiler import EnergyGradient
from fastebm.sampling.cascade import device_of
from fastebm.scalars import as_device
from fastebm.tasks.arguments import check_layout, check_number
from fastebm.tasks.detection.batches import (
    Energy,
    ImageBatches,
    Model,
    check_finite,
    energy_of,
    gradient_of,
    image_batches,
    over_images,
)
from fastebm.tasks.detection.level_statistics import LevelStatistics, gradient_norms

Scores = dict[str, NDArray[np.float32]]

ORDER = (
    "combined",
    "energy",
    "gradient_norm",
    "typicality",
    "level_energy",
    "level_typicality",
    "total_variation",
    "untrained_combined",
    "untrained_energy",
    "untrained_level_energy",
    "untrained_level_typicality",
)


@dataclass(frozen=True)
class DetectionMetrics:
    """How well a score separates outliers, which are the positive class and should score high, from other images.

    Attributes:
        auroc: area under the ROC curve: the probability that an outlier scores higher than another image; 0.5 by
            chance.
        aupr: average precision; by chance it is the share of outliers among all images, so it compares only between
            sets of equal counts.
        fpr95: false positive rate where 95 % of the outliers are found.
    """

    auroc: float
    aupr: float
    fpr95: float


def outlier_scores(
    model: Model,
    images: ImageBatches,
    *,
    training_mean: float | None = None,
    levels: LevelStatistics | None = None,
    untrained: Energy | EnergyGradient | None = None,
    untrained_levels: LevelStatistics | None = None,
    batch_size: int = 256,
    dtype: torch.dtype | None = torch.float32,
    engine: str = "auto",
    device: torch.device | str | None = None,
    progress: bool | str = False,
) -> Scores:
    """Scores of N images by name, each a float32 array (N,), high for outliers.

    - "combined": Fisher's combination of "energy" and "level_typicality", if `levels` is passed: -2 (log p + log q),
      with p and q the probabilities that a training image scores as high by the one and by the other. The energy is
      that of the highest of `levels`. The score to use where nothing is known of the outliers.
    - "energy": E(x)
    - "gradient_norm": the Euclidean norm of the gradient of E at x
    - "typicality": |E(x) - training_mean|, if that mean is passed (`mean_energy` computes it)
    - "level_energy": max over the levels s of (E_s(x_s) - mean_s) / std_s, if `levels` is passed; x_s is the image
      averaged down to size s, mean and standard deviation are over training images. An image is an outlier if any
      level says so. A maximum and not a sum, because an energy is not trained on images that lower levels make
      improbable, and in a sum it could outweigh theirs.
    - "level_typicality": the Mahalanobis distance of all level energies and logarithms of gradient norms from their
      mean over training images, with their covariance; it is large for energies that are too low, too
    - "total_variation": the image's `total_variation`, a baseline without an energy
    - "untrained_energy": the energy `untrained`, if it is passed
    - "untrained_combined", "untrained_level_energy" and "untrained_level_typicality": those of `untrained_levels`, if
      it is passed. Its statistics are over training images, its nets untrained: what it finds, simple statistics
      of pixels show.

    Args:
        model: a run, its folder, or what `fastebm.energy_gradient` takes or returns. An `EnergyGradient` has its own
            `dtype` and `engine` and is compiled once for many sets. `levels.highest` is that of the highest level;
            passing it avoids evaluating that level twice. The same holds for `untrained`.
        images: float32 (N, C, H, W) in [-1, 1]; or `Images` in bytes; or an iterable of float batches of one shape, of
            which only one is in memory at a time. Floats in [0, 1] can't be told from these: `2 * images - 1` converts
            them.
        batch_size: images that the net evaluates at a time.
        dtype, engine: as in `fastebm.energy_gradient`. The default is float32: bfloat16 has 128 numbers between an
            energy of 1 and one of 2, and ties make a ranking coarse.
        device: where the energy is; by default where its weights lie.
        progress: shows a bar; a text is its name.

    Raises:
        ValueError: for no images, other shapes, values outside of [-1, 1] or NaN, or an energy that is not finite, with
            the number of the image.
        TypeError: for another dtype.

    Example:
        >>> import torch
        >>> from fastebm.tasks import outlier_scores
        >>> def energy(x):
        ...     return x.square().sum((1, 2, 3)) / 2
        >>> scores = outlier_scores(energy, torch.ones(5, 1, 2, 2), training_mean=0.5)
        >>> {name: float(values[0]) for name, values in scores.items()}
        {'energy': 2.0, 'gradient_norm': 2.0, 'typicality': 1.5, 'total_variation': 0.0}
    """
    if training_mean is not None:
        training_mean = check_number("training_mean", training_mean)
    energy = energy_of(model)
    gradient = gradient_of(energy, dtype, engine)
    baseline = None if untrained is None else gradient_of(untrained, dtype, engine)
    device = device_of(energy) if device is None else as_device(device)

    def of(rows: range | None) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for first, batch in image_batches(images, batch_size, device, progress, rows):
            scores = _scores(gradient, levels, batch, first)
            scores["total_variation"] = total_variation(batch)
            if training_mean is not None:
                scores["typicality"] = (scores["energy"].double() - training_mean).abs()
            without = _scores(baseline, untrained_levels, batch, first)
            without.pop("gradient_norm", None)
            scores |= {f"untrained_{name}": values for name, values in without.items()}
            for name, values in scores.items():
                check_finite(name, values, first)
                parts.setdefault(name, []).append(values.float().cpu())
        return {name: torch.cat(values) for name, values in parts.items()}

    found = over_images(images, of)
    return {name: found[name].numpy() for name in ORDER if name in found}


def _scores(
    gradient: EnergyGradient | None, levels: LevelStatistics | None, batch: Tensor, first: int
) -> dict[str, Tensor]:
    """The scores of one net and of its levels; an energy that is also the highest level's is evaluated once."""
    scores: dict[str, Tensor] = {}
    top = None
    if gradient is not None:
        energies, slopes = gradient(batch)
        scores = {"energy": energies, "gradient_norm": gradient_norms(slopes)}
        check_finite("energy", energies, first)
        if levels is not None and levels.highest is gradient:
            top = (energies, scores["gradient_norm"])
    if levels is not None:
        scores |= levels.scores(batch, first, top)
    return scores


def mean_energy(model: Model, images: ImageBatches, **options: Any) -> float:
    """The mean energy of images, for example of training images, which "typicality" is measured from.

    Arguments and errors are those of `outlier_scores`.
    """
    return float(outlier_scores(model, images, **options)["energy"].mean(dtype=np.float64))


def total_variation(images: Tensor) -> Tensor:
    """Sum of the absolute differences between neighbouring pixels, down and across: (N,) of images (N, C, H, W).

    Rudin, Osher and Fatemi 1992, in its anisotropic form. Raises TypeError or ValueError unless they are float32 like
    that.
    """
    check_layout("images", images)
    down, across = images.diff(dim=2), images.diff(dim=3)
    return down.abs().sum((1, 2, 3)) + across.abs().sum((1, 2, 3))


def detection_metrics(in_scores: ArrayLike, out_scores: ArrayLike) -> DetectionMetrics:
    """How well scores separate outliers, whose scores should be the higher ones, from images of the distribution.

    Args:
        in_scores: (N,) scores of images of the distribution.
        out_scores: (M,) scores of outliers.

    Raises ValueError for scores that are empty, not finite or not one-dimensional.

    Example:
        >>> from fastebm.tasks import detection_metrics
        >>> detection_metrics([0.1, 0.2, 0.6], [0.7, 0.8])
        DetectionMetrics(auroc=1.0, aupr=1.0, fpr95=0.0)
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    labels, scores = _labels_and_scores(in_scores, out_scores)
    false_positives, true_positives = roc_curve(in_scores, out_scores)
    return DetectionMetrics(
        auroc=float(roc_auc_score(labels, scores)),
        aupr=min(1.0, float(average_precision_score(labels, scores))),  # its sum may round to more
        fpr95=float(false_positives[np.searchsorted(true_positives, 0.95)]),
    )


def roc_curve(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ROC curve: false and true positive rates, both ascending. Arguments and errors as in `detection_metrics`."""
    from sklearn import metrics

    rates = metrics.roc_curve(*_labels_and_scores(in_scores, out_scores), drop_intermediate=False)
    return rates[0], rates[1]


def _labels_and_scores(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Labels, True for outliers, and scores, as scikit-learn takes them."""
    both = [np.asarray(scores, dtype=np.float64) for scores in (in_scores, out_scores)]
    for name, scores in zip(("in_scores", "out_scores"), both, strict=True):
        if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
            finite = "" if np.isfinite(scores).all() else ", with values that are not"
            raise ValueError(f"{name} must be finite and (N,) with N >= 1, got {scores.shape}{finite}")
    return np.repeat([False, True], [len(scores) for scores in both]), np.concatenate(both)
