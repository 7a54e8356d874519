"""Langevin chains of a quadratic energy against closed forms, to sampling error, with fixed seeds.

For `E = a x**2 / 2` an update is `x' = rho x + sigma xi` with `rho = 1 - eta a`, an autoregression: after k updates
from a fixed start the mean is `rho**k x0` and the variance `sigma**2 (1 - rho**(2k)) / (1 - rho**2)`, which tends to
`sigma**2 / (2 eta a - eta**2 a**2)`.
"""

import math

import pytest
import torch

from fastebm.sampling import Langevin, from_epsilon, linear, polynomial

SHAPE = (50_000, 4)
COUNT = SHAPE[0] * SHAPE[1]
ERRORS = 5  # standard errors


def quadratic(a):
    return lambda x: 0.5 * a * x.square().sum(dim=1)


def assert_moments(x, mean, variance):
    """The empirical mean and variance of normal variables lie within `ERRORS` standard errors of the given ones."""
    x = x.double()
    assert x.mean().item() == pytest.approx(mean, abs=ERRORS * math.sqrt(variance / COUNT) + 1e-6)
    assert x.var().item() == pytest.approx(variance, abs=ERRORS * variance * math.sqrt(2 / COUNT))


@pytest.mark.parametrize(
    ("a", "eta", "sigma"),
    [
        (1.0, 0.5, 0.3),
        (2.0, 0.3, 1.0),
        (0.5, 1.0, 0.05),
        (3.0, 0.55, 0.4),  # rho < 0: the chain overshoots
    ],
)
def test_stationary_variance_of_the_discretised_chain(a, eta, sigma):
    x = Langevin(quadratic(a), eta, sigma).sample(torch.full(SHAPE, 0.1), num_steps=40, seed=11)
    assert_moments(x, mean=0.1 * (1 - eta * a) ** 40, variance=sigma**2 / (2 * eta * a - eta**2 * a**2))


def test_transient():
    a, eta, sigma, start, rho = 1.5, 0.1, 0.2, 3.0, 0.85
    seen = []

    def compare(k, x, info):
        assert_moments(x, rho**k * start, sigma**2 * (1 - rho ** (2 * k)) / (1 - rho**2))
        seen.append(k)

    Langevin(quadratic(a), eta, sigma).sample(torch.full(SHAPE, start), 12, seed=12, keep=compare, thin=3)
    assert seen == [3, 6, 9, 12]


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 1.5])
def test_textbook_chain_of_a_standard_normal_has_the_known_bias(epsilon):
    x = Langevin(quadratic(1.0), **from_epsilon(epsilon)).sample(torch.zeros(SHAPE), num_steps=60, seed=13)
    contraction = (1 - epsilon**2 / 2) ** 120
    assert_moments(x, mean=0.0, variance=(1 - contraction) / (1 - epsilon**2 / 4))


def test_schedules_reach_the_chain():
    a, num_steps, start = 1.0, 9, 2.0
    step_size, noise_std = polynomial(0.5, 0.1, 2.0), linear(0.4, 0.0)
    mean, variance = start, 0.0
    for k in range(num_steps):
        t = k / (num_steps - 1)
        rho = 1 - a * (0.1 + 0.4 * (1 - t) ** 2)
        mean, variance = rho * mean, rho**2 * variance + (0.4 * (1 - t)) ** 2
    x = Langevin(quadratic(a), step_size, noise_std).sample(torch.full(SHAPE, start), num_steps, seed=14)
    assert_moments(x, mean, variance)


def test_no_noise_is_gradient_descent():
    x0 = torch.linspace(-2, 2, 12).reshape(3, 4)
    x = Langevin(quadratic(0.5), 0.4, 0.0).sample(x0, num_steps=10, seed=1)
    torch.testing.assert_close(x, x0 * 0.8**10)


def test_anchor_shifts_the_mean():
    """With a pull w (x - t) the drift is that of the energy (a + w)/2 (x - w t / (a + w))**2."""
    a, w, target, eta, sigma = 1.0, 3.0, 2.0, 0.2, 0.3
    x0 = torch.zeros(SHAPE)
    x = Langevin(quadratic(a), eta, sigma).sample(x0, 40, seed=15, data_term=(torch.full((1, 4), target), w))
    rate = eta * (a + w)
    assert_moments(x, mean=w * target / (a + w), variance=sigma**2 / (2 * rate - rate**2))


def test_chains_are_independent():
    x = Langevin(quadratic(1.0), 0.5, 1.0).sample(torch.zeros(SHAPE), num_steps=20, seed=16).double()
    correlation = torch.corrcoef(torch.cat((x.T, x.roll(1, 0).T)))
    off_diagonal = correlation - torch.eye(8)
    assert off_diagonal.abs().max() < ERRORS / math.sqrt(SHAPE[0])


def test_implied_temperature():
    sampler = Langevin(quadratic(1.0), 0.1, 0.2)
    assert sampler.temperature().tolist() == pytest.approx([0.2])
    assert Langevin(quadratic(1.0), **from_epsilon(0.3)).temperature(3).tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    falling = Langevin(quadratic(1.0), 2.0, linear(0.2, 0.0)).temperature(3)
    assert falling.tolist() == pytest.approx([0.01, 0.0025, 0])
    assert "temperature 0.2)" in repr(sampler)
    assert "temperature 0.01 to 0)" in repr(Langevin(quadratic(1.0), 2.0, linear(0.2, 0.0)))
