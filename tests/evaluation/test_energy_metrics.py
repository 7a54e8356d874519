"""Health of energies that have closed forms, and of a small net."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastebm.evaluation import acceptance_rate, energy_metrics, log_acceptance
from fastebm.evaluation.energy_metrics import in_double, last_level_settings, long_chains
from fastebm.models import CoarseToFineEnergy
from fastebm.ops import normal
from fastebm.sampling import Cascade, Langevin, linear


def gaussian(x: Tensor) -> Tensor:
    return 0.5 * x.square().flatten(1).sum(1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(600, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("step_size", [1e-3, 0.1, 0.9])
def test_the_log_ratio_of_a_gaussian_has_a_closed_form(x: Tensor, step_size: float) -> None:
    # At temperature 1 on E = |x|^2 / 2 the terms collapse to -(step_size / 4) (|x'|^2 - |x|^2).
    noise_std = math.sqrt(2 * step_size)
    there = (1 - step_size) * x + noise_std * normal(x.shape, seed=3).double()
    expected = -step_size / 4 * (there.square().sum(1) - x.square().sum(1))
    torch.testing.assert_close(log_acceptance(gaussian, x, step_size, noise_std, seed=3), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("curvature", [0.5, 4.0])
@pytest.mark.parametrize("noise_std", [0.05, 0.7])
def test_the_log_ratio_at_any_temperature_is_that_of_densities(x: Tensor, curvature: float, noise_std: float) -> None:
    step_size = 0.3
    temperature = noise_std**2 / (2 * step_size)
    there = (1 - step_size * curvature) * x + noise_std * normal(x.shape, seed=0).double()

    def log_density(point: Tensor) -> Tensor:
        return -curvature * point.square().sum(1) / 2 / temperature

    def log_proposal(end: Tensor, start: Tensor) -> Tensor:
        mean = start - step_size * curvature * start
        return torch.distributions.Normal(mean, noise_std).log_prob(end).sum(1)

    expected = log_density(there) + log_proposal(x, there) - log_density(x) - log_proposal(there, x)
    found = log_acceptance(lambda x: curvature * gaussian(x), x, step_size, noise_std)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-9)


def test_the_rate_of_a_stationary_gaussian_is_its_integral() -> None:
    # x ~ N(0, 1), x' = (1 - h) x + sqrt(2 h) xi, in one dimension: integrated on a grid.
    step_size = 1.2
    grid = np.linspace(-8, 8, 1601)
    here, noise = np.meshgrid(grid, grid)
    weight = np.exp(-(here**2 + noise**2) / 2)
    there = (1 - step_size) * here + math.sqrt(2 * step_size) * noise
    expected = (np.minimum(1, np.exp(-step_size / 4 * (there**2 - here**2))) * weight).sum() / weight.sum()
    many = torch.randn(40_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rate = acceptance_rate(gaussian, many, step_size, math.sqrt(2 * step_size), seed=7)
    assert rate == pytest.approx(expected, abs=0.01)
    assert expected < 0.9


def test_acceptance_goes_to_1_as_steps_go_to_0(x: Tensor) -> None:
    rates = [acceptance_rate(gaussian, x, step, math.sqrt(2 * step)) for step in (1.5, 0.5, 0.1, 1e-2, 1e-4)]
    assert rates == sorted(rates)
    assert rates[0] < 0.9
    assert rates[-1] > 0.9999


def test_overshooting_steps_are_rejected_and_descents_accepted(x: Tensor) -> None:
    # Far above equilibrium, at a temperature of 1e-6: x' = (1 - h) x is a fall in energy up to h = 2, then a rise.
    assert acceptance_rate(gaussian, x, step_size=1.0, noise_std=1e-3) > 0.99
    assert acceptance_rate(gaussian, x, step_size=2.5, noise_std=1e-3) < 0.01


def test_a_descent_has_no_acceptance(x: Tensor) -> None:
    for step_size, noise_std in ((0.1, 0.0), (0.0, 0.1)):
        with pytest.raises(ValueError, match="positive step_size and noise_std"):
            log_acceptance(gaussian, x, step_size, noise_std)


def test_long_chains_contract_as_the_gaussian_says() -> None:
    start = torch.full((10, 1, 4, 4), 0.5)
    long = long_chains(gaussian, start, 0.1, 0.0, num_steps=7)
    end = 0.5 * 0.9**7
    assert long.motion == pytest.approx(0.5 - end, rel=1e-5)
    assert (long.energy_start, long.energy_end) == (pytest.approx(8 * 0.25), pytest.approx(8 * end**2, rel=1e-5))
    assert long.finite_share == 1
    torch.testing.assert_close(long.images, torch.full_like(start, end))


def test_chains_that_leave_the_finite_numbers_are_counted() -> None:
    start = torch.full((10, 1, 2, 2), 0.5)
    start[:4] = 0
    long = long_chains(lambda x: -gaussian(x), start, 1e6, 0.0, num_steps=20)
    assert long.finite_share == 0.4
    assert long.images.shape == (4, 1, 2, 2)
    assert long.motion == 0
    lost = long_chains(lambda x: -gaussian(x), start[4:], 1e6, 0.0, num_steps=20)
    assert lost.finite_share == 0
    assert math.isnan(lost.motion)


def test_the_gap_is_samples_minus_data() -> None:
    samples, real = torch.full((6, 1, 2, 2), 1.0), torch.full((8, 1, 2, 2), 0.5)
    metrics = energy_metrics(gaussian, samples, real, step_size=0.1, noise_std=0.0, num_steps=3)
    assert (metrics.count, metrics.energy_samples, metrics.energy_data) == (6, 2.0, 0.5)
    assert (metrics.gap, metrics.energy_data_std, metrics.temperature) == (1.5, 0, 0)
    assert (metrics.acceptance_samples, metrics.acceptance_data) == (None, None)
    assert metrics.long_run.num_steps == 30
    stored = json.loads(json.dumps(metrics.to_json(), allow_nan=False))
    assert (stored["gap"], stored["long_num_steps"]) == (1.5, 30)
    with pytest.raises(ValueError, match="must be alike"):
        energy_metrics(gaussian, samples, torch.zeros(3, 1, 4, 4), step_size=0.1, noise_std=0.0, num_steps=3)


def test_a_net_and_its_cascade() -> None:
    net = CoarseToFineEnergy(8, 1, base_width=2, lowest=4)
    cascade = Cascade({4: net.frozen(4), 8: net.frozen(8)}, num_steps=5, step_size=0.5, noise_std=linear(0.1, 0.0))
    settings = last_level_settings(cascade)
    assert settings["num_steps"] == 10
    assert settings["step_size"] == 0.5
    noise = np.linspace(0.1, 0, 10)[5:]
    assert settings["noise_std"] == pytest.approx(np.sqrt((noise**2).mean()), rel=1e-6)
    samples = cascade.sample(20, 0, channels=1).clamp(-1, 1)
    energy = net.frozen(8)
    metrics = energy_metrics(energy, samples, samples.flip(3), seed=1, **settings)
    assert 0 <= metrics.acceptance_samples <= 1
    assert next(energy.parameters()).dtype == torch.float32
    # The copy in float64 is the same energy.
    exact = in_double(energy)
    assert isinstance(exact, nn.Module)
    torch.testing.assert_close(exact.eval()(samples.double()).float(), energy.eval()(samples), atol=1e-4, rtol=1e-4)


def test_long_chains_run_in_the_type_that_samples_are_made_in() -> None:
    net = CoarseToFineEnergy(8, 1, base_width=2, lowest=4).frozen(8)
    start = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    real, settings = start.flip(3), {"step_size": 0.5, "noise_std": 0.01, "num_steps": 1}
    single, low = (energy_metrics(net, start, real, dtype=t, **settings) for t in (torch.float32, torch.bfloat16))
    expected = Langevin(net, 0.5, 0.01, dtype=torch.bfloat16).sample(start, 10, 0, chain_ids=2**40).clamp(-1, 1)
    assert torch.equal(low.long_run.images, expected)
    assert not torch.equal(low.long_run.images, single.long_run.images)
    torch.testing.assert_close(low.long_run.images, single.long_run.images, atol=0.05, rtol=0)


def test_long_chains_have_the_clip_of_training():
    start = torch.full((3, 1, 2, 2), 0.5)
    free = long_chains(gaussian, start, 0.1, 0.0, num_steps=4)
    clipped = long_chains(gaussian, start, 0.1, 0.0, num_steps=4, grad_norm_clip=1e-3)
    assert free.motion > 0.1
    assert 0 < clipped.motion < 4 * 0.1 * 1e-3
