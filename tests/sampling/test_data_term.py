"""Pulls to what was measured: weights of data terms, and updates that take them implicitly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastebm.sampling import Cascade, data_term_weight, implicit_step
from tests.docstrings import run_examples

CURVATURE = 15.0


def bowl(x: Tensor) -> Tensor:
    return 0.5 * CURVATURE * (x - 0.5).square().sum((1, 2, 3))


def test_an_implicit_step_is_the_update_whose_pull_is_at_its_end() -> None:
    step, weight = 0.3, 2.0
    x, y, slope = (torch.tensor(value, dtype=torch.float64) for value in (0.7, -0.2, 1.3))
    after = x - implicit_step(step, weight) * (slope + weight * (x - y))
    torch.testing.assert_close(after, x - step * slope - step * weight * (after - y))


@pytest.mark.parametrize("weight", [0.1, 10.0, 1e6])
def test_chains_with_a_pull_end_at_the_mean_of_the_posterior_at_any_weight(weight: float) -> None:
    """Where a step of 0.1 alone is just stable, 1.5 of 2: with an explicit pull of 10 it would not be."""
    cascade = Cascade({4: bowl}, step_size=0.1, noise_std=0.0, num_steps=200)
    y = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    ends = cascade.sample(x0=y, seed=0, data_term=(y, weight))
    torch.testing.assert_close(ends, (CURVATURE * 0.5 + weight * y) / (CURVATURE + weight), rtol=1e-4, atol=1e-5)


def test_the_weight_is_that_of_bayes() -> None:
    # Under noise of std 0.2 and a prior exp(-E / T) a bowl's posterior has the mean that the pull leads to.
    temperature, std = 0.05, 0.2
    y = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    ends = Cascade({4: bowl}, step_size=0.05, noise_std=0.0, num_steps=300).sample(
        x0=y, seed=0, data_term=(y, data_term_weight(temperature, std))
    )
    prior, measured = temperature / CURVATURE, std**2  # variances
    torch.testing.assert_close(ends, (0.5 * measured + y * prior) / (prior + measured), rtol=1e-4, atol=1e-5)
    assert data_term_weight(0.0, 0.1) == 0


def test_docstring_examples() -> None:
    assert run_examples("fastebm.sampling.data_term") == (0, 2)
