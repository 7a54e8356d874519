"""Targets of the literature whose moments are known: exact samplers meet them within error bars.

The funnel is Neal's (Slice sampling, 2003), the banana Haario's (Adaptive proposal, 1999), the Rosenbrock density the
even one of Goodman and Weare (2010), which factorises into pairs; the lattice is phi^4 on a torus, of which the virial
theorem is known: the mean of phi dE/dphi is the temperature at every site.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fastebm
from tests.sampling.targets import kolmogorov_smirnov

CHAINS = 1500


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Target:
    """An energy, exact draws of it, and step sizes of MALA and HMC at which some of the proposals are rejected."""

    energy: Callable[[Tensor], Tensor]
    draw: Callable[[int, int], Tensor]
    mala: float
    hmc: float


def funnel(x: Tensor) -> Tensor:
    v, rest = x[:, 0], x[:, 1:]
    return v.square() / 18 + 0.5 * (rest.square().sum(1) * torch.exp(-v) + rest.shape[1] * v)


def draw_funnel(count: int, seed: int) -> Tensor:
    z = normal(count, 6, seed=seed)
    return torch.cat((3 * z[:, :1], z[:, 1:] * (1.5 * z[:, :1]).exp()), 1)


def banana(x: Tensor) -> Tensor:
    return x[:, 0].square() / 200 + 0.5 * (x[:, 1] + 0.03 * x[:, 0].square() - 3).square()


def draw_banana(count: int, seed: int) -> Tensor:
    z = normal(count, 2, seed=seed)
    first = 10 * z[:, 0]
    return torch.stack((first, z[:, 1] - 0.03 * first.square() + 3), 1)


def rosenbrock(x: Tensor) -> Tensor:
    """100 dimensions in 50 pairs."""
    first, second = x[:, 0::2], x[:, 1::2]
    return ((first - 1).square() + 5 * (second - first.square()).square()).sum(1)


def draw_rosenbrock(count: int, seed: int) -> Tensor:
    z = normal(count, 100, seed=seed)
    first = 1 + z[:, 0::2] * math.sqrt(0.5)
    return torch.stack((first, first.square() + z[:, 1::2] * math.sqrt(0.1)), 2).flatten(1)


GRID = torch.cartesian_prod(torch.arange(-2.0, 3.0), torch.arange(-2.0, 3.0)) * 2.0


def grid_mixture(x: Tensor) -> Tensor:
    """25 modes of equal weight, of standard deviation 0.2."""
    return -torch.logsumexp(-((x[:, None] - GRID).square().sum(2)) / 0.08, 1)


def draw_grid(count: int, seed: int) -> Tensor:
    mode = torch.randint(25, (count,), generator=torch.Generator().manual_seed(seed))
    return GRID[mode] + 0.2 * normal(count, 2, seed=seed)


TARGETS = {
    "funnel": Target(funnel, draw_funnel, 0.02, 0.15),
    "banana": Target(banana, draw_banana, 0.8, 0.8),
    "Rosenbrock in 100 dimensions": Target(rosenbrock, draw_rosenbrock, 0.004, 0.08),
    "25 modes": Target(grid_mixture, draw_grid, 0.03, 0.2),
}
SAMPLERS = {
    "MALA": lambda t: fastebm.MALA(t.energy, t.mala),
    "HMC": lambda t: fastebm.HMC(t.energy, t.hmc, 5),
    "GHMC": lambda t: fastebm.GHMC(t.energy, t.hmc),
    "MALT": lambda t: fastebm.MALT(t.energy, t.hmc, 5, friction=0.5),
    "AdjustedMCLMC": lambda t: fastebm.AdjustedMCLMC(t.energy, t.hmc * len(t.draw(1, 0)[0]) ** 0.5, 3),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_exact_draws_stay_exact_draws(name, target):
    start = target.draw(CHAINS, 1)
    rates = []
    x = SAMPLERS[name](target).sample(
        start, 20, seed=2, keep=lambda k, x, info: rates.append(info.accepted.float().mean())
    )
    assert 0.3 < float(torch.stack(rates).mean()) < 0.9999
    assert float((x != start).any(1).float().mean()) > 0.8, "the chains moved"
    fresh = target.draw(CHAINS, 3)
    for i in {0, 1, x.shape[1] - 1}:
        assert kolmogorov_smirnov(x[:, i], fresh[:, i]) > 1e-3
    assert kolmogorov_smirnov(target.energy(x), target.energy(fresh)) > 1e-3
    # The means of 40 functions with known variances, each within 5 standard errors.
    waves = normal(40, x.shape[1], seed=4) / x.std(0)
    for function in (torch.sin, torch.cos):
        apart = function(x @ waves.T).mean(0) - function(fresh @ waves.T).mean(0)
        error = function(fresh @ waves.T).std(0) * (2 / CHAINS) ** 0.5
        assert float((apart / error).abs().max()) < 5


@pytest.mark.parametrize("name", ["MALA", "HMC", "MALT"])
def test_the_virial_of_a_lattice(name):
    """On an 8 x 8 torus with mass -1 and coupling 1, where neighbours order: the mean of phi dE/dphi is 1."""

    def energy(phi: Tensor) -> Tensor:
        bonds = sum((phi - phi.roll(1, axis)).square() for axis in (1, 2))
        return (0.5 * bonds - 0.5 * phi.square() + 0.25 * phi.pow(4)).flatten(1).sum(1)

    make = {
        "MALA": lambda: fastebm.MALA(energy, 0.03),
        "HMC": lambda: fastebm.HMC(energy, 0.18, 6),
        "MALT": lambda: fastebm.MALT(energy, 0.18, 6, friction=0.5),
    }
    chain, steps = make[name](), 400 if name == "MALA" else 120
    sums = []

    def add(k, x, info):
        if k > steps // 2:
            with torch.enable_grad():
                phi = x.detach().double().requires_grad_()
                (slope,) = torch.autograd.grad(energy(phi).sum(), phi)
            sums.append((phi * slope).mean((1, 2)).detach())

    chain.sample(normal(200, 8, 8, seed=0), steps, seed=1, keep=add, thin=5)
    of_chains = torch.stack(sums).mean(0)  # chains are independent, so that they tell the error
    error = float(of_chains.std()) / len(of_chains) ** 0.5
    assert abs(float(of_chains.mean()) - 1) < 5 * error
    assert error < 0.01


def test_tempering_fills_all_modes():
    """All replicas begin in one of 25 modes; at the lowest temperature each mode gets its share."""
    sampler = fastebm.ParallelTempering(
        grid_mixture, (1.0, 3.0, 9.0, 27.0), lambda e, t: fastebm.MALA(e, 0.02 * t, temperature=t), swap_every=2
    )
    count = 500
    x = sampler.sample(torch.zeros(count, 2), 600, seed=1)
    share = torch.bincount(torch.cdist(x, GRID).argmin(1), minlength=25) / count
    assert float(share.min()) > 0.04 - 5 * (0.04 * 0.96 / count) ** 0.5
    assert float(share.max()) < 0.04 + 5 * (0.04 * 0.96 / count) ** 0.5
    plain = fastebm.MALA(grid_mixture, 0.02).sample(torch.zeros(count, 2), 600, seed=1)
    assert float((torch.cdist(plain, GRID).argmin(1) == 12).float().mean()) > 0.9
