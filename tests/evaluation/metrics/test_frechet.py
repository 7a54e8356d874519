"""Fréchet distance against scipy, torchmetrics and closed forms; statistics in files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastebm.evaluation import FeatureStatistics, frechet_distance
from tests.evaluation.metrics.random_features import features


def by_scipy(a: Tensor, b: Tensor) -> float:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(cov_x @ cov_y)
    gap = x.mean(0) - y.mean(0)
    return float(gap @ gap + np.trace(cov_x + cov_y - 2 * np.real(root)))


@pytest.mark.parametrize("width", [1, 6, 40])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_frechet_agrees_with_scipy(width: int, shift: float) -> None:
    a, b = features(300, width), features(200, width, shift, seed=1) * 1.3
    expected = (
        by_scipy(a, b)
        if width > 1
        else float((a.double().mean() - b.double().mean()) ** 2 + (a.double().std() - b.double().std()) ** 2)
    )
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-6, rel=1e-9)


def test_frechet_of_diagonal_covariances_has_a_closed_form() -> None:
    means = torch.tensor([[0.0, 1.0, -2.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    stds = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.5, 1.0]], dtype=torch.float64)
    one, two = (FeatureStatistics(mean, std.square().diag()) for mean, std in zip(means, stds, strict=True))
    expected = float((means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum())
    assert frechet_distance(one, two) == pytest.approx(expected, abs=1e-12)


def test_frechet_of_rank_deficient_features_is_exact() -> None:
    # Fewer samples than features, where roots of the product of covariances turn complex.
    a = features(10, 40)
    assert frechet_distance(a, a.clone()) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 40, abs=1e-6)


def test_frechet_agrees_with_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = features(300), features(200, shift=0.5, seed=1)
    extractor = torch.nn.Identity()
    extractor.num_features = 6
    metric = fid.FrechetInceptionDistance(feature=extractor)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), abs=1e-6)


def test_statistics_survive_a_file_in_the_common_format(tmp_path: Path) -> None:
    statistics = FeatureStatistics.of(features(50))
    statistics.save(tmp_path / "real.npz")
    with np.load(tmp_path / "real.npz") as arrays:
        assert sorted(arrays) == ["mu", "sigma"]
        np.testing.assert_allclose(arrays["sigma"], np.cov(features(50).double().numpy(), rowvar=False), atol=1e-12)
    loaded = FeatureStatistics.load(tmp_path / "real.npz")
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.covariance, statistics.covariance)
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32))
    assert FeatureStatistics.load(tmp_path / "theirs.npz").mean.dtype == torch.float64


def test_a_label_tells_other_features_of_the_same_length(tmp_path: Path) -> None:
    path = tmp_path / "real.npz"
    FeatureStatistics.of(features(50), "ours").save(path)
    with np.load(path, allow_pickle=False) as arrays:
        assert sorted(arrays) == ["features", "mu", "sigma"]
    loaded = FeatureStatistics.load(path)
    assert loaded.label == "ours"
    assert frechet_distance(FeatureStatistics.of(features(50), "ours"), loaded) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features(50), loaded) == pytest.approx(0, abs=1e-9)  # nobody knows of which
    with pytest.raises(ValueError, match="statistics of the features theirs and ours: they must be of one kind"):
        frechet_distance(FeatureStatistics.of(features(50), "theirs"), loaded)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), features=np.zeros((4, 3)))  # somebody else's array of that name
    assert FeatureStatistics.load(path).label is None


def test_files_without_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for arrays in ({"mu": np.zeros(3)}, {"mu": np.zeros(3), "sigma": np.eye(4)}, {"mu": np.eye(3), "sigma": np.eye(3)}):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=r"x\.npz"):
            FeatureStatistics.load(path)
    for sigma in (np.triu(np.ones((3, 3))), -np.eye(3), np.eye(3) + 1j):
        np.savez(path, mu=np.zeros(3), sigma=sigma)
        with pytest.raises(ValueError, match=r"x\.npz: .*(symmetric|complex128)"):
            FeatureStatistics.load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"x\.npz"):
        FeatureStatistics.load(path)
    with pytest.raises(FileNotFoundError):
        FeatureStatistics.load(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    "bad", [features(10, 3), features(1), torch.full((10, 6), torch.nan), torch.zeros(10), torch.zeros(10, 0)]
)
def test_wrong_features_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="features"):
        frechet_distance(features(10), bad)
