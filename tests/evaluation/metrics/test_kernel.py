"""Kernel distance against sums over all pairs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastebm.evaluation import kernel_distance
from tests.evaluation.metrics.random_features import features


def by_sums(a: Tensor, b: Tensor) -> float:
    """The unbiased squared discrepancy, term by term."""
    x, y = a.double().numpy(), b.double().numpy()

    def kernel(u: np.ndarray, v: np.ndarray) -> float:
        return float((u @ v / len(u) + 1) ** 3)

    n, m = len(x), len(y)
    among_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    among_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return among_x + among_y - 2 * sum(kernel(u, v) for u in x for v in y) / (n * m)


def test_kernel_distance_agrees_with_sums_over_pairs() -> None:
    a, b = features(25), features(25, shift=0.5, seed=1)
    found = kernel_distance(a, b, subsets=3)
    assert found.mean == pytest.approx(by_sums(a, b), rel=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9)


def test_kernel_distance_of_subsets_is_a_function_of_the_seed() -> None:
    a, b = features(300), features(200, shift=0.5, seed=1)
    state = torch.get_rng_state()
    first = kernel_distance(a, b, subsets=20, subset_size=50, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert kernel_distance(a, b, subsets=20, subset_size=50, seed=4) == first
    assert kernel_distance(a, b, subsets=20, subset_size=50, seed=5) != first
    whole = kernel_distance(a, b[:200], subsets=1).mean
    assert abs(first.mean - whole) < 5 * first.std / 20**0.5 + 0.02 * abs(whole)


@pytest.mark.parametrize(
    "bad", [features(10, 3), features(1), torch.full((10, 6), torch.nan), torch.zeros(10), torch.zeros(10, 0)]
)
def test_wrong_features_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="features"):
        kernel_distance(features(10), bad)


def test_a_subset_needs_two_features() -> None:
    with pytest.raises(ValueError, match="subset_size"):
        kernel_distance(features(10), features(10), subset_size=1)
