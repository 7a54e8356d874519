"""Outliers by energy: scores of images, and how well a score tells two sets apart.

An energy-based model says how unlikely an image is. Du and Mordatch ("Implicit Generation and Modeling with
Energy-Based Models", NeurIPS 2019) score by the energy itself, Grathwohl et al. ("Your Classifier is Secretly an Energy
Based Model", ICLR 2020) by the norm of its gradient, Nalisnick et al. ("Detecting Out-of-Distribution Inputs to Deep
Generative Models Using Typicality", 2019) by the distance from what training images typically have. Lee et al. ("A
Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018) measure such
a distance in features of a net, by their covariance over training images. Two baselines show what needs no training:
the total variation of an image, and the scores of an untrained net.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastebm.compiler import EnergyGradient
from fastebm.sampling.cascade import device_of
from fastebm.tasks.detection.batches import Energy, ImageBatches, check_finite, checked_batches, prepared
from fastebm.tasks.detection.level_statistics import LevelStatistics, gradient_norms

Scores = dict[str, NDArray[np.float32]]

ORDER = (
    "energy",
    "gradient_norm",
    "typicality",
    "level_energy",
    "level_typicality",
    "total_variation",
    "untrained_energy",
    "untrained_level_energy",
    "untrained_level_typicality",
)


@dataclass(frozen=True)
class DetectionMetrics:
    """How well a score tells outliers, which are the positive class and should score high, from the rest.

    Attributes:
        auroc: area under the ROC curve: the probability that an outlier scores higher than an image of the
            distribution, 0.5 by chance.
        aupr: average precision; by chance it is the share of outliers among all images, so it compares only between
            sets of equal counts.
        fpr95: share of images of the distribution that are taken for outliers where 95 % of the outliers are found.
    """

    auroc: float
    aupr: float
    fpr95: float


def outlier_scores(
    energy: Energy | EnergyGradient,
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
    progress: bool = False,
) -> Scores:
    """Scores of N images by name, each a float32 array (N,), high for outliers.

    - "energy": E(x)
    - "gradient_norm": the Euclidean norm of the gradient of E at x
    - "typicality": |E(x) - training_mean|, where that mean is given (`mean_energy` gives it)
    - "level_energy": max over the levels s of (E_s(x_s) - mean_s) / std_s, with x_s the image averaged down to s, and
      mean and deviation over training images, where `levels` is given: an image is an outlier if any level finds it
      unlikely. A maximum, because an energy means nothing for images that lower levels refuse; in a sum it could make
      up for their verdict.
    - "level_typicality": the Mahalanobis distance of all level energies and logarithms of gradient norms from their
      mean over training images, with their covariance, likewise: a Gaussian typicality, to both sides
    - "total_variation": of `total_variation`, which knows nothing of the energy
    - "untrained_energy": of `untrained`, where it is given
    - "untrained_level_energy" and "untrained_level_typicality": of `untrained_levels`, where they are given. These know
      the training images, but by nets that know nothing: what they find, simple statistics of pixels tell apart.

    Args:
        energy: what `fastebm.energy_gradient` takes: images (B, C, H, W) to one number each, low for real ones. Or what
            it gives, whose `dtype` and `engine` are then those used, and which is prepared once for many sets. That of
            the highest of `levels` is `levels.highest`, which spares evaluating it twice; likewise for `untrained`.
        images: float32 (N, C, H, W) in [-1, 1]; or bytes, as `fastebm.data.open_images` reads them; or batches of such
            floats, one after the other, of which only one is in memory.
        batch_size: images in the net at a time.
        dtype, engine: as in `fastebm.energy_gradient`; float32 by default, because bfloat16 has 256 numbers between an
            energy of 1 and one of 2, and ties blur a ranking.
        device: where the energy is; by default where its weights lie.
        progress: shows a bar.

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
    gradient = prepared(energy, dtype, engine)
    baseline = None if untrained is None else prepared(untrained, dtype, engine)
    parts: dict[str, list[Tensor]] = {}
    where = device_of(energy) if device is None else torch.device(device)
    for first, batch in checked_batches(images, batch_size, where, progress):
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
    return {name: torch.cat(parts[name]).numpy() for name in ORDER if name in parts}


def _scores(
    gradient: EnergyGradient | None, levels: LevelStatistics | None, batch: Tensor, first: int
) -> dict[str, Tensor]:
    """Scores of one net, those of its levels among them; an energy that is also the highest level's runs once."""
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


def mean_energy(
    energy: Energy | EnergyGradient,
    images: ImageBatches,
    *,
    batch_size: int = 256,
    dtype: torch.dtype | None = torch.float32,
    engine: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = False,
) -> float:
    """The mean energy of images, such as those of training, from which typicality is measured.

    Arguments and errors are those of `outlier_scores`.
    """
    gradient = prepared(energy, dtype, engine)
    total, count = 0.0, 0
    where = device_of(energy) if device is None else torch.device(device)
    for first, batch in checked_batches(images, batch_size, where, progress):
        energies, _ = gradient(batch)
        check_finite("energy", energies, first)
        total += float(energies.double().sum())
        count += len(batch)
    return total / count


def total_variation(images: Tensor) -> Tensor:
    """Sum of the absolute differences between neighbouring pixels, down and across: (N,) of images (N, C, H, W).

    Rudin, Osher and Fatemi 1992, in its anisotropic form.
    """
    down, across = images.diff(dim=2), images.diff(dim=3)
    return down.abs().sum((1, 2, 3)) + across.abs().sum((1, 2, 3))


def detection_metrics(in_scores: ArrayLike, out_scores: ArrayLike) -> DetectionMetrics:
    """How well scores tell outliers, whose scores should be the higher ones, from images of the distribution.

    Args:
        in_scores: (N,) of images of the distribution.
        out_scores: (M,) of outliers.

    Raises ValueError for scores that are empty, not finite or not one-dimensional.

    Example:
        >>> from fastebm.tasks import detection_metrics
        >>> detection_metrics([0.1, 0.2, 0.6], [0.7, 0.8])
        DetectionMetrics(auroc=1.0, aupr=1.0, fpr95=0.0)
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    labels, scores = labelled(in_scores, out_scores)
    false_positives, true_positives = roc(in_scores, out_scores)
    return DetectionMetrics(
        auroc=float(roc_auc_score(labels, scores)),
        aupr=float(average_precision_score(labels, scores)),
        fpr95=float(false_positives[np.searchsorted(true_positives, 0.95)]),
    )


def roc(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ROC curve: shares of false and of true positives, both ascending. Arguments as in `detection_metrics`."""
    from sklearn.metrics import roc_curve

    false_positives, true_positives, _ = roc_curve(*labelled(in_scores, out_scores), drop_intermediate=False)
    return false_positives, true_positives


def labelled(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Labels, True for outliers, and scores, as scikit-learn takes them. Errors as in `detection_metrics`."""
    given = [np.asarray(scores, dtype=np.float64) for scores in (in_scores, out_scores)]
    for name, scores in zip(("in_scores", "out_scores"), given, strict=True):
        if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
            finite = "" if np.isfinite(scores).all() else ", with values that are not"
            raise ValueError(f"{name} must be finite and (N,) with N >= 1, got {scores.shape}{finite}")
    return np.repeat([False, True], [len(scores) for scores in given]), np.concatenate(given)
