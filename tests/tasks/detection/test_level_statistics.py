"""Scores over the levels of a cascade, against closed forms and SciPy, and what they mend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.spatial.distance import mahalanobis
from scipy.stats import combine_pvalues, expon
from torch import Tensor

import fastebm
from fastebm.compiler import EnergyGradient, energy_gradient
from fastebm.tasks import LevelStatistics, detection_metrics, outlier_scores

LEVEL_SCORES = ["level_energy", "level_typicality"]


def gaussian(std: float, mean: float = 0.0) -> Any:
    """The energy of a Gaussian, ||x - mean||^2 / (2 std^2), whose gradient norm is sqrt(2 E) / std."""
    return lambda x: (x - mean).square().sum((1, 2, 3)) / (2 * std**2)


LEVELS = {4: gaussian(0.2, 0.3), 2: gaussian(0.1, -0.2)}  # not in the order of their sizes


def images(count: int, seed: int) -> Tensor:
    return (0.2 * fastebm.ops.normal((count, 1, 4, 4), seed=seed)).clamp(-1, 1)


def features_by_hand(x: Tensor) -> NDArray[np.float64]:
    """(N, 4): the energies at 2x2 and 4x4, then the logarithms of their gradients' norms."""
    pooled = F.avg_pool2d(x, 2)
    energies = np.stack([LEVELS[2](pooled).double().numpy(), LEVELS[4](x).double().numpy()], axis=1)
    return np.concatenate([energies, np.log(np.sqrt(2 * energies) / [0.1, 0.2])], axis=1)


@pytest.fixture(scope="module")
def statistics() -> LevelStatistics:
    return LevelStatistics.fit(LEVELS, images(300, seed=1), engine="autograd", batch_size=64)


def test_the_statistics_are_those_of_the_features(statistics: LevelStatistics) -> None:
    features = features_by_hand(images(300, seed=1))
    assert statistics.count == 300
    assert statistics.sizes == (2, 4)
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.T, ddof=0), rtol=1e-4, atol=1e-5)
    assert statistics.mean_energies == pytest.approx(dict(zip((2, 4), features[:, :2].mean(0), strict=True)))
    assert statistics.energy_deviations == pytest.approx(dict(zip((2, 4), features[:, :2].std(0), strict=True)))


def test_scores_of_gaussian_energies_are_known(statistics: LevelStatistics) -> None:
    training, others = features_by_hand(images(300, seed=1)), features_by_hand(images(20, seed=2))
    scores = outlier_scores(LEVELS[4], images(20, seed=2), levels=statistics, engine="autograd")
    assert list(scores) == ["combined", "energy", "gradient_norm", *LEVEL_SCORES, "total_variation"]
    standard = (others - training.mean(0)) / training.std(0)
    np.testing.assert_allclose(scores["level_energy"], standard[:, :2].max(1), rtol=1e-4, atol=1e-4)
    inverse = np.linalg.inv(np.cov(training.T, ddof=0))
    expected = [mahalanobis(row, training.mean(0), inverse) for row in others]
    np.testing.assert_allclose(scores["level_typicality"], expected, rtol=1e-3)
    own = []
    for row in range(300):
        rest = np.delete(training, row, axis=0)
        own.append(mahalanobis(training[row], rest.mean(0), np.linalg.inv(np.cov(rest.T, ddof=0))))
    statistic = combine_pvalues_by_hand(training[:, 1], others[:, 1], own, expected)
    np.testing.assert_allclose(scores["combined"], statistic, rtol=2e-3, atol=0.02)  # a rank may differ by rounding


def combine_pvalues_by_hand(*pairs: Any) -> NDArray[np.float64]:
    """SciPy's combination, of shares of training scores, and of exponentials above what a tenth of them exceeds."""
    found = []
    for own, scored in (pairs[:2], pairs[2:]):
        own = np.sort(own)
        threshold = own[-31]
        shares = (1 + (own[:, None] >= np.asarray(scored)).sum(0)) / 301
        beyond = 0.1 * expon.sf(scored, loc=threshold, scale=(own[-30:] - threshold).mean())
        found.append(np.where(scored > threshold, np.maximum(beyond, shares - (1 - shares) / 300), shares))
    return np.array([combine_pvalues(each, method="fisher").statistic for each in np.transpose(found)])


def test_squared_distances_of_training_images_have_the_mean_of_chi_square(statistics: LevelStatistics) -> None:
    """The trace of a covariance by its own inverse: exactly the number of features, whatever their distribution."""
    distances = statistics.scores(images(300, seed=1))["level_typicality"]
    assert float(distances.square().mean()) == pytest.approx(4, rel=1e-4)


def test_units_of_an_energy_do_not_matter(statistics: LevelStatistics) -> None:
    scaled = {2: LEVELS[2], 4: lambda x: 7 * LEVELS[4](x) - 100}
    other = LevelStatistics.fit(scaled, images(300, seed=1), engine="autograd").scores(images(20, seed=2))
    for name, values in statistics.scores(images(20, seed=2)).items():
        np.testing.assert_allclose(other[name], values, rtol=1e-3, atol=1e-4)


def test_a_level_below_sees_what_the_highest_rates_as_real() -> None:
    """The fault of a cascade's top level: it prefers what it has never seen, as here all that lies far out."""
    levels = {2: gaussian(0.1), 4: lambda x: -x.square().sum((1, 2, 3)) + 0.1 * x.sum((1, 2, 3))}
    statistics = LevelStatistics.fit(levels, images(300, seed=1), engine="autograd")
    far = 2 * fastebm.ops.uniform((100, 1, 4, 4), seed=3) - 1
    inside, outside = (
        outlier_scores(statistics.highest, x, levels=statistics, untrained_levels=statistics)
        for x in (images(100, seed=2), far)
    )
    aurocs = {name: detection_metrics(inside[name], outside[name]).auroc for name in inside}
    assert aurocs["energy"] < 0.01
    assert aurocs["level_energy"] > 0.95
    assert aurocs["level_typicality"] > 0.99
    assert aurocs["combined"] > 0.99
    for name in ("combined", *LEVEL_SCORES):
        np.testing.assert_array_equal(outside[name], outside[f"untrained_{name}"])


@pytest.mark.parametrize("batch_size", [1, 7, 20])
def test_scores_do_not_depend_on_batches_or_on_what_is_spared(statistics: LevelStatistics, batch_size: int) -> None:
    once = outlier_scores(statistics.highest, images(20, seed=2), levels=statistics, batch_size=batch_size)
    twice = outlier_scores(LEVELS[4], images(20, seed=2), levels=statistics, engine="autograd")
    for name, values in twice.items():
        np.testing.assert_allclose(once[name], values, rtol=1e-6, atol=1e-6)


def test_the_highest_energy_runs_once(statistics: LevelStatistics, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    call = EnergyGradient.__call__

    def watched(self: EnergyGradient, x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(x.shape[2:]))
        return call(self, x)

    monkeypatch.setattr(EnergyGradient, "__call__", watched)
    outlier_scores(statistics.highest, images(5, seed=2), levels=statistics)
    assert sorted(seen) == [(2, 2), (4, 4)]


def test_one_level_is_enough() -> None:
    statistics = LevelStatistics.fit({4: energy_gradient(LEVELS[4], engine="autograd")}, images(50, seed=1))
    scores = statistics.scores(images(9, seed=2))
    energies = LEVELS[4](images(9, seed=2)).double()
    expected = (energies - statistics.mean_energies[4]) / statistics.energy_deviations[4]
    np.testing.assert_allclose(scores["level_energy"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("levels", "count", "message"),
    [
        ({}, 50, "there are no levels"),
        (LEVELS, 5, "statistics of 2 levels need more than 5 training images, got 5"),
        (LEVELS, 0, "no images"),
        ({4: lambda x: x.sum((1, 2, 3))}, 50, "don't vary independently"),  # a gradient of one norm
        ({2: LEVELS[2], 4: lambda x: LEVELS[2](F.avg_pool2d(x, 2))}, 50, "don't vary independently"),
        ({3: LEVELS[2], 4: LEVELS[4]}, 50, "can't be halved to size 3"),
        ({2: lambda x: x.sum((1, 2, 3)).log(), 4: LEVELS[4]}, 50, r"the energy at 2x2 of image \d+ is nan"),
    ],
)
def test_what_makes_no_statistics(levels: dict[int, Any], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LevelStatistics.fit(levels, images(50, seed=1)[:count], engine="autograd")


@pytest.mark.parametrize("count", [6, 12, 50])
def test_the_combination_of_other_images_is_hardly_larger_with_few(count: int) -> None:
    """A chi-square with 4 degrees of freedom has the mean 4. Distances of images from their own mean are too small."""
    statistics = LevelStatistics.fit(LEVELS, images(count, seed=1), engine="autograd")
    assert float(statistics.scores(images(500, seed=2))["combined"].median()) < 8
