"""Calibration for any generator: where chains end, what the loss pulls, anchors, noise floor, the dual update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastebm.sampling import Langevin
from fastebm.training import DataTerm, DualUpdate, calibrate, calibration_loss, noise_floor


def bowl(x: Tensor) -> Tensor:
    """A quadratic energy around 1."""
    return 0.5 * (x - 1).square().flatten(1).sum(1)


def test_a_generator_learns_the_energys_mean() -> None:
    generator = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(generator.parameters(), 0.05)
    sampler = Langevin(bowl, step_size=0.1, noise_std=1e-3)
    draws = torch.Generator().manual_seed(0)
    for k in range(60):
        samples = generator(torch.randn(64, 2, generator=draws))
        targets = calibrate(samples, sampler, 10, seed=0, chain_ids=64 * k)
        assert not targets.requires_grad
        optimizer.zero_grad()
        calibration_loss(samples, targets).backward()
        optimizer.step()
    assert torch.allclose(generator.bias, torch.ones(3), atol=0.05)
    assert generator.weight.abs().max() < 0.2


def test_chains_start_at_the_samples_and_are_anchored_to_them() -> None:
    start = torch.full((8, 1, 2, 2), -1.0)
    still = Langevin(bowl, step_size=1e-9, noise_std=0.0)
    torch.testing.assert_close(calibrate(start, still, 5), start)
    moving = Langevin(bowl, step_size=0.1, noise_std=0.0)
    free = calibrate(start, moving, 5)
    held = calibrate(start, moving, 5, data_term=DataTerm(5.0))
    assert (held - start).abs().max() < 0.85 * (free - start).abs().max()
    # Within the hinge, a squared distance for each number, there is no pull; weight 0 is none at all.
    torch.testing.assert_close(calibrate(start, moving, 5, data_term=DataTerm(5.0, hinge=100.0)), free)
    torch.testing.assert_close(calibrate(start, moving, 5, data_term=DataTerm(0.0)), free)
    assert calibrate(start, moving, 1, data_term=DataTerm(5.0)).shape == start.shape


def test_the_moments_of_an_anchored_chain_in_a_bowl_are_those_of_its_recursion() -> None:
    count, num_steps, rate, noise, weight = 4000, 12, 0.1, 0.05, 2.0
    start = torch.full((count, 4), -0.5)
    sampler = Langevin(bowl, step_size=rate, noise_std=noise)
    ends = calibrate(start, sampler, num_steps, seed=5, data_term=DataTerm(weight))
    mean, variance = -0.5, 0.0
    for k in range(num_steps):
        pull = weight * (1 - k / (num_steps - 1))
        mean = mean - rate * ((mean - 1) + pull * (mean + 0.5))
        variance = (1 - rate * (1 + pull)) ** 2 * variance + noise**2
    error = math.sqrt(variance / (4 * count))
    assert float(ends.mean()) == pytest.approx(mean, abs=5 * error)
    assert float(ends.var()) == pytest.approx(variance, rel=0.05)


def test_the_noise_floor_is_the_loss_of_noise_alone() -> None:
    start = torch.zeros(2000, 1, 4, 4)
    sampler = Langevin(lambda x: 0.0 * x.flatten(1).sum(1), step_size=1.0, noise_std=0.03)
    loss = float(calibration_loss(start, calibrate(start, sampler, 15, seed=1)))
    assert noise_floor(sampler, 15, 16) == pytest.approx(15 * 0.03**2 * 16)
    assert loss == pytest.approx(noise_floor(sampler, 15, 16), rel=0.03)
    assert noise_floor(sampler, 0, 16) == 0


def test_the_dual_update_follows_the_threshold_within_its_bounds() -> None:
    dual = DualUpdate(rate=10.0, threshold=0.05, largest=31.0)
    assert dual(30.0, 0.05) == 30.0
    assert dual(30.0, 0.07) == pytest.approx(30.2)
    assert dual(30.0, 9.0) == 31.0
    assert dual(0.1, 0.0) == 0.0
    assert DualUpdate(rate=0.0, threshold=0.05, largest=1.0)(30.0, 9.0) == 30.0


def test_what_can_not_be_calibrated_is_refused() -> None:
    sampler = Langevin(bowl, step_size=0.1, noise_std=0.0)
    with pytest.raises(FloatingPointError, match="samples are not finite"):
        calibrate(torch.full((2, 3), math.nan), sampler, 2)
    with pytest.raises(ValueError, match="one shape"):
        calibration_loss(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="weight must be finite"):
        DataTerm(-1.0)
