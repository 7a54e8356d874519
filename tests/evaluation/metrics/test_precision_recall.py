"""Precision and recall against brute force."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastebm.evaluation import precision_recall
from tests.evaluation.metrics.random_features import features


def by_brute_force(points: np.ndarray, members: np.ndarray, k: int) -> float:
    inside = 0
    for point in points:
        for i, member in enumerate(members):
            others = sorted(np.linalg.norm(member - other) for j, other in enumerate(members) if j != i)
            if np.linalg.norm(point - member) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_agree_with_brute_force(k: int) -> None:
    real, samples = features(60, 4), features(40, 4, shift=1.0, seed=1) * 0.8
    found = precision_recall(samples, real, neighbours=k)
    x, y = samples.double().numpy(), real.double().numpy()
    assert found.precision == pytest.approx(by_brute_force(x, y, k), abs=1e-12)
    assert found.recall == pytest.approx(by_brute_force(y, x, k), abs=1e-12)
    assert 0 < found.recall < 1
    assert 0 < found.precision < 1


def test_precision_and_recall_at_their_ends() -> None:
    real = features(50)
    assert precision_recall(real, real.clone()) == (1, 1)
    assert precision_recall(features(50, seed=1) + 1000, real) == (0, 0)
    one_mode = real[:1] + 1e-3 * features(50, seed=2)
    precision, recall = precision_recall(one_mode, real)
    assert (precision, recall) == (1, pytest.approx(0, abs=0.05))


@pytest.mark.parametrize(
    "bad", [features(10, 3), features(1), torch.full((10, 6), torch.nan), torch.zeros(10), torch.zeros(10, 0)]
)
def test_wrong_features_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="features"):
        precision_recall(features(10), bad)


def test_there_are_more_features_than_neighbours() -> None:
    with pytest.raises(ValueError, match="neighbours"):
        precision_recall(features(10), features(3))
