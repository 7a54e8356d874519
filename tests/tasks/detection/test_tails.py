"""Upper tails: probabilities that are right where they are known, and never rise with the score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2, expon, kstest

from fastebm.tasks.detection.tails import UpperTail, fisher


def exponential(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).exponential(3.0, count))


def test_an_exponential_tail_is_found() -> None:
    tail = UpperTail.fit(exponential(20_000, 0))
    scores = torch.tensor([1.0, 3.0, 20.0, 60.0])
    np.testing.assert_allclose(tail.log_probability(scores), expon.logsf(scores, scale=3), rtol=0.05)


def test_combined_probabilities_are_uniform_where_scores_are_independent() -> None:
    """By Fisher's theorem the statistic of two is that of a chi-square with 4 degrees of freedom."""
    tails = [UpperTail.fit(exponential(20_000, seed)) for seed in (0, 1)]
    statistic = fisher(tail.log_probability(exponential(2000, 2 + n)) for n, tail in enumerate(tails))
    assert kstest(statistic, chi2(4).cdf).pvalue > 0.01


@pytest.mark.parametrize("count", [2, 3, 19, 20, 1000])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_it_never_rises_and_is_a_probability(count: int, levels: int) -> None:
    """For few scores and equal ones too; scores far out stay finite."""
    scores = exponential(count, count).mul(levels).round().div(levels)
    tail = UpperTail.fit(scores)
    at = torch.cat([torch.tensor([-1e30]), scores, torch.linspace(-1, 50, 999), torch.tensor([1e30])]).double()
    found = tail.log_probability(at.sort().values)
    assert bool(found.isfinite().all())
    assert float(found[0]) == 0
    assert bool((found.diff() <= 0).all())
    assert float(found[-1]) < -1e20


def test_equal_scores_have_a_tail() -> None:
    found = UpperTail.fit(torch.full((9,), 2.0)).log_probability(torch.tensor([1.0, 2.0, 3.0]))
    assert found.tolist()[:2] == [0, 0]
    assert -10 < float(found[2]) < 0


def test_no_probability_is_below_the_share_that_is_as_high() -> None:
    """Where scores are equal an exponential falls faster than they do."""
    rounded = torch.from_numpy(np.random.default_rng(0).normal(0, 3, 1000)).round()
    for scores in (rounded, torch.tensor([0.0] * 99 + [1.0])):
        found = UpperTail.fit(scores).log_probability(scores.unique())
        share = (scores >= scores.unique()[:, None]).double().mean(1)
        assert bool((found.exp() > 0.99 * share).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    tail, at = UpperTail.fit(exponential(70_000, 0)), exponential(100, 1)
    expected, default = tail.log_probability(at), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = tail.log_probability(at)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(found, expected)
    assert "tensor" not in repr(tail)
