"""Losses in float64 against plain formulas, autograd on frozen copies, and closed forms for Gaussians."""

import copy
import doctest
import importlib
import itertools
import math

import pytest
import torch
from torch import nn

from fastebm import Langevin
from fastebm.losses import (
    contrastive_divergence,
    denoising_score_matching,
    energy_l2,
    improved_cd_kl,
    last_step,
    nearest_distance,
    recovery_energy,
    recovery_likelihood,
    sliced_score_matching,
)
from fastebm.models import CoarseToFineEnergy


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1), nn.Flatten(0)
    return nn.Sequential(*layers).double()


def images(batch, seed=1):
    return torch.randn(batch, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def signs(size):
    """All 2^size vectors of +-1: their mean is 0, their covariance 1, so they average quadratic forms exactly."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=torch.float64)


def gradients(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, materialize_grads=True)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def plain_gradient(net, x):
    """grad E, one sample at a time."""
    rows = [x[k : k + 1].detach().requires_grad_() for k in range(len(x))]
    return torch.cat([torch.autograd.grad(net(row).sum(), row, create_graph=True)[0] for row in rows])


# Contrastive divergence -----------------------------------------------------------------------------------------------


def test_contrastive_divergence_and_l2_are_their_formulas(net):
    data, samples = images(5), images(4, seed=2)
    loss = contrastive_divergence(net(data), net(samples)) + 0.1 * energy_l2(net(data), net(samples))
    high, low = [net(x[None]).sum() for x in samples], [net(x[None]).sum() for x in data]
    plain = sum(low) / 5 - sum(high) / 4 + 0.1 * (sum(e**2 for e in low) / 5 + sum(e**2 for e in high) / 4)
    assert_equal([loss, *gradients(loss, net)], [plain, *gradients(plain, net)])
    torch.testing.assert_close(energy_l2(torch.tensor([1.0, 3.0])), torch.tensor(5.0))


def test_contrastive_divergence_has_the_gradient_of_the_likelihood_of_a_gaussian():
    """E = a x^2 / 2 with exact samples, which two points of its standard deviation stand for."""
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    data = images(3).flatten()
    samples = torch.tensor([1.0, -1.0], dtype=torch.float64) / a.detach().sqrt()
    (found,) = torch.autograd.grad(contrastive_divergence(a * data**2 / 2, a * samples**2 / 2), a)
    likelihood = torch.distributions.Normal(torch.zeros_like(a), a**-0.5).log_prob(data).mean()
    (expected,) = torch.autograd.grad(-likelihood, a)
    torch.testing.assert_close(found, expected)


# Score matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.3, torch.tensor([0.1, 0.5, 2.0, 1.0], dtype=torch.float64)])
def test_denoising_score_matching_is_its_formula(net, sigma):
    x, noise = images(4), images(4, seed=2)
    levels = torch.as_tensor(sigma, dtype=torch.float64).expand(4)
    loss = denoising_score_matching(net, x, sigma, noise=noise)
    noisy = torch.stack([x[k] + levels[k] * noise[k] for k in range(4)])
    # Vincent's loss 1/2 |score + (noisy - x) / sigma^2|^2 of the score -grad E, times sigma^2
    scores = -plain_gradient(net, noisy)
    plain = sum((scores[k] + (noisy[k] - x[k]) / levels[k] ** 2).square().sum() * levels[k] ** 2 / 2 for k in range(4))
    assert_equal([loss, *gradients(loss, net)], [plain / 4, *gradients(plain / 4, net)])


def test_denoising_score_matching_is_least_at_the_noisy_gaussian():
    """Data N(0, 1.5^2) and noise 0.8: the best E = x^2 / (2 v) has v = 1.5^2 + 0.8^2."""
    points = signs(2)
    v = torch.tensor(1.5**2 + 0.8**2, dtype=torch.float64, requires_grad=True)
    loss = denoising_score_matching(
        lambda x: x.square().sum(1) / (2 * v), 1.5 * points[:, :1], 0.8, noise=points[:, 1:]
    )
    (slope,) = torch.autograd.grad(loss, v)
    assert abs(float(slope)) < 1e-14
    torch.testing.assert_close(loss.item(), 0.5 * (1 - 0.8**2 / v.item()))  # the variance that is left


@pytest.mark.parametrize("reduce_variance", [True, False])
def test_sliced_score_matching_is_its_formula(net, reduce_variance):
    x, directions = images(3), images(6, seed=2).view(2, 3, 2, 3)
    loss = sliced_score_matching(net, x, directions=directions, reduce_variance=reduce_variance)
    terms = []
    for k in range(3):
        hessian = torch.autograd.functional.hessian(lambda z: net(z[None]).sum(), x[k], create_graph=True).view(6, 6)
        gradient = plain_gradient(net, x[k : k + 1]).flatten()
        for v in directions[:, k].flatten(1):
            square = gradient.square().sum() if reduce_variance else (v @ gradient) ** 2
            terms.append(-v @ hessian @ v + square / 2)
    plain = torch.stack(terms).mean()
    assert_equal([loss, *gradients(loss, net)], [plain, *gradients(plain, net)])


@pytest.mark.parametrize("reduce_variance", [True, False])
def test_sliced_score_matching_is_least_at_the_gaussian(reduce_variance):
    covariance = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    x = signs(2) @ torch.linalg.cholesky(covariance).T
    precision = torch.linalg.inv(covariance).requires_grad_()
    loss = sliced_score_matching(
        lambda x: 0.5 * (x @ precision * x).sum(1),
        x,
        directions=signs(2)[:, None].expand(4, 4, 2),
        reduce_variance=reduce_variance,
    )
    (slope,) = torch.autograd.grad(loss, precision)
    assert slope.abs().max() < 1e-14
    torch.testing.assert_close(loss, -0.5 * precision.trace())  # score matching's least value


def test_score_matching_draws_its_own_noise(net):
    x = images(4)
    torch.manual_seed(3)
    first = denoising_score_matching(net, x, 0.5), sliced_score_matching(net, x, num_directions=3)
    torch.manual_seed(3)
    noise, directions = torch.randn_like(x), torch.randn(3, *x.shape, dtype=torch.float64)
    again = denoising_score_matching(net, x, 0.5, noise=noise), sliced_score_matching(net, x, directions=directions)
    assert_equal(first, again)


# Improved contrastive divergence --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", [(None, None), (0, 1), (-0.5, None)])
def test_improved_cd_differentiates_the_last_step_and_not_the_energy_behind_it(net, clamp):
    x = images(5)
    made = last_step(net, x, 0.7, clamp=clamp)
    loss = improved_cd_kl(net, made)
    frozen = copy.deepcopy(net).requires_grad_(False)
    ends = x - 0.7 * plain_gradient(net, x)
    if clamp != (None, None):
        ends = ends.clamp(*clamp)
    plain = frozen(ends).mean()
    assert_equal([loss, *gradients(loss, net)], [plain, *gradients(plain, net)])
    whole, ours = gradients(net(ends).mean(), net), gradients(loss, net)
    assert max((a - b).abs().max() for a, b in zip(whole, ours, strict=True)) > 1e-3
    torch.testing.assert_close(made, ends)


def test_improved_cd_of_a_gaussian():
    """E = a x^2 / 2: x' = (1 - s a) x, and d/da of b x'^2 / 2 with b fixed at a is -a s (1 - s a) x^2."""
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x, step = torch.tensor([[2.0]], dtype=torch.float64), 0.3

    def bowl(x):
        return a * x.square().sum(1) / 2

    loss = improved_cd_kl(bowl, last_step(bowl, x, step))
    (slope,) = torch.autograd.grad(loss, a)
    kept = 1 - step * 0.7
    torch.testing.assert_close(loss.item(), 0.7 * (kept * 2) ** 2 / 2)
    torch.testing.assert_close(slope.item(), -0.7 * step * kept * 4)


def test_nearest_distance_is_its_formula():
    x, others = images(5).requires_grad_(), images(7, seed=2)
    found = nearest_distance(x, others)
    plain = torch.stack([(x[k] - others).flatten(1).norm(dim=1).min() for k in range(5)])
    assert_equal(
        [found, *torch.autograd.grad(found.log().sum(), x)], [plain, *torch.autograd.grad(plain.log().sum(), x)]
    )


def test_a_state_among_the_others_has_a_finite_logarithm():
    x = images(3).requires_grad_()
    distance = nearest_distance(x, torch.cat((images(3)[:1], images(7, seed=2))))
    (slope,) = torch.autograd.grad(distance.log().sum(), x)
    assert 0 < distance[0] < 1e-100
    assert slope.isfinite().all()
    assert not slope[0].any()


# Recovery likelihood --------------------------------------------------------------------------------------------------


def test_recovery_likelihood_has_the_gradient_of_the_likelihood_of_a_gaussian():
    """E = a x^2 / 2: given the noisy version, x is normal with precision a + 1 / sigma^2."""
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x, noise = images(2).flatten(), images(2, seed=2).flatten()
    sigma = torch.linspace(0.2, 2.0, 12, dtype=torch.float64)
    weight = 0.2 / sigma
    noisy = x + sigma * noise
    precision = a + sigma**-2
    mean = noisy / sigma**2 / precision
    spread = precision.detach() ** -0.5
    # Two chain ends for each image stand for exact samples.
    ends = torch.cat((mean + spread, mean - spread)).detach()
    loss = recovery_likelihood(a * x.repeat(2) ** 2 / 2, a * ends**2 / 2, weight.repeat(2))
    likelihood = torch.distributions.Normal(mean, precision**-0.5).log_prob(x)
    expected = torch.autograd.grad(-(weight * likelihood).mean(), a)
    torch.testing.assert_close(torch.autograd.grad(loss, a), expected)

    at = mean.detach().view(-1, 1).requires_grad_()
    energies = recovery_energy(lambda x: a.detach() * x.square().sum(1) / 2, at, noisy.view(-1, 1), sigma)
    assert torch.autograd.grad(energies.sum(), at)[0].abs().max() < 1e-14
    plain = 0.35 * mean**2 + (mean - noisy) ** 2 / (2 * sigma**2)
    torch.testing.assert_close(energies, plain.detach())


def test_chains_of_the_recovery_energy_are_compiled():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1), nn.Flatten(0))

    def plain(x, noisy, sigma):
        return net(x) + 0.5 * ((x - noisy) / sigma[:, None]).square().sum(1)

    noisy, sigma = torch.randn(6, 4), torch.linspace(0.2, 1.0, 6)
    found, expected = (
        Langevin(energy, 0.001, 0.01, engine="fused").sample(noisy, 20, 0, conditions=(noisy, sigma))
        for energy in (lambda x, noisy, sigma: recovery_energy(net, x, noisy, sigma), plain)
    )
    torch.testing.assert_close(found, expected)


def test_recovery_likelihood_is_its_formula(net):
    data, samples, weight = images(4), images(4, seed=2), torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    loss = recovery_likelihood(net(data), net(samples), weight)
    plain = sum(weight[k] * (net(data[k : k + 1]) - net(samples[k : k + 1])).sum() for k in range(4)) / 4
    assert_equal([loss, *gradients(loss, net)], [plain, *gradients(plain, net)])
    same = recovery_likelihood(net(data), net(samples))
    torch.testing.assert_close(same, contrastive_divergence(net(data), net(samples)))
    torch.testing.assert_close(recovery_likelihood(net(data), net(samples), 0.25), 0.25 * same)


def improved_loss(net, x):
    ends = last_step(net, x, 0.5, clamp=(-1, 1))
    return improved_cd_kl(net, ends) - 0.3 * nearest_distance(ends, x).log().mean()


# Everywhere -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda net, x: denoising_score_matching(net, x, 0.5, noise=x.flip(0)),
        lambda net, x: sliced_score_matching(net, x, directions=x.flip(0)[None]),
        improved_loss,
    ],
    ids=["denoising", "sliced", "improved"],
)
def test_values_without_gradients_and_for_energies_of_other_forms(net, loss):
    x = images(4)
    with torch.no_grad():
        value = loss(net, x)
    assert not value.requires_grad
    torch.testing.assert_close(value, loss(net, x).detach())
    assert not x.requires_grad
    assert all(p.grad is None for p in net.parameters())
    linear = nn.Linear(6, 1).double()
    straight = loss(lambda x: linear(x.flatten(1))[:, 0], x)  # its Hessian is 0, and not in the graph
    assert straight.isfinite()
    with torch.no_grad():
        assert loss(lambda x: x.new_ones(len(x)), x).isfinite()  # no gradient at all
    assert loss(lambda x: x.square() / 2, x[:, 0, 0]).isfinite()  # states without dimensions


def test_losses_train_our_own_nets():
    """CF-EBM's fused blocks are differentiated twice."""
    torch.manual_seed(0)
    energy = CoarseToFineEnergy(8, channels=1, base_width=4).eval()
    x = torch.rand(2, 1, 8, 8)
    improved_cd_kl(energy, last_step(energy, x, 0.1, clamp=(0, 1))).backward()
    denoising_score_matching(energy, x, 0.3).backward()
    assert all(p.grad.isfinite().all() for p in energy.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in energy.parameters()) > 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x, e: contrastive_divergence(x, e),
            ValueError,
            r"data must be energies of shape \(B,\), B >= 1, got \(4, 2, 3\)",
        ),
        (lambda x, e: contrastive_divergence(e, e[:0]), ValueError, r"samples must be energies .* got \(0,\)"),
        (lambda x, e: contrastive_divergence(e, 1.0), TypeError, "samples must be a tensor of energies, got 1.0"),
        (lambda x, e: energy_l2(), ValueError, "energy_l2 needs the energies of one batch at least, got none"),
        (lambda x, e: energy_l2(e, e.long()), TypeError, "energies must be a tensor of energies"),
        (lambda x, e: denoising_score_matching(total, x, 0.0), ValueError, "sigma must be finite and > 0"),
        (lambda x, e: denoising_score_matching(total, x, math.nan), ValueError, "sigma must be finite and > 0"),
        (lambda x, e: denoising_score_matching(total, x, -0.5), ValueError, "sigma must be finite and > 0"),
        (lambda x, e: denoising_score_matching(total, x, "1"), TypeError, "sigma must be a real number"),
        (
            lambda x, e: denoising_score_matching(total, x, e[:3]),
            ValueError,
            r"sigma must be a number or float \(4,\), got",
        ),
        (
            lambda x, e: denoising_score_matching(total, x, 1.0, noise=x[0]),
            ValueError,
            r"noise must be a tensor \(4, 2, 3\) of torch.float64 like x",
        ),
        (lambda x, e: denoising_score_matching(total, x.long(), 1.0), TypeError, "x must be a tensor of floating"),
        (lambda x, e: denoising_score_matching(total, x[:0], 1.0), ValueError, r"x must have shape \(B, ...\), B >= 1"),
        (
            lambda x, e: denoising_score_matching(lambda x: x.sum(), x, 1.0),
            ValueError,
            r"the energy must return one number a sample, shape \(4,\), got a tensor \(\)",
        ),
        (lambda x, e: sliced_score_matching(total, x, num_directions=0), ValueError, "num_directions must be at least"),
        (
            lambda x, e: sliced_score_matching(total, x, directions=x),
            ValueError,
            r"directions must have shape \(M, 4, 2, 3\), got",
        ),
        (lambda x, e: last_step(total, x, -1.0), ValueError, "step_size must be finite and > 0, got -1.0"),
        (lambda x, e: last_step(total, x, 1.0, clamp=(1, 0)), ValueError, "clamp needs low <= high"),
        (lambda x, e: last_step(total, x, 1.0, clamp=(math.nan, 0)), ValueError, "clamp must be finite"),
        (lambda x, e: last_step(total, x, 1.0, clamp=1.0), TypeError, r"clamp is a pair \(low, high\), got 1.0"),
        (lambda x, e: improved_cd_kl(total, x), ValueError, "needs ends that are differentiable, as last_step returns"),
        (lambda x, e: nearest_distance(x, x[:0]), ValueError, "others must have shape"),
        (lambda x, e: nearest_distance(x, x[:, 0]), ValueError, r"others must be states \(2, 3\) like x, got \(3,\)"),
        (lambda x, e: denoising_score_matching(total, x, -e), ValueError, "sigma must be finite and > 0, got -"),
        (lambda x, e: recovery_energy(total, x, x, 0.0), ValueError, "sigma must be finite and > 0"),
        (lambda x, e: recovery_energy(total, x, x, e[:2]), ValueError, r"sigma must be a number or float \(4,\), got"),
        (lambda x, e: recovery_energy(total, x, x[:2], 1.0), ValueError, "noisy must be a tensor"),
        (lambda x, e: recovery_likelihood(e, e[:2]), ValueError, "come in pairs, got 4 and 2 energies"),
        (lambda x, e: recovery_likelihood(e, e, -1.0), ValueError, "weight must be finite and not negative"),
        (lambda x, e: recovery_likelihood(e, e, e[:2]), ValueError, r"weight must be a number or float \(4,\)"),
        (lambda x, e: recovery_likelihood(e, e, -e.abs()), ValueError, "weight must be finite and not negative"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    x = images(4)
    with pytest.raises(error, match=message) as refused:
        call(x, x.flatten(1).sum(1))
    assert "\n" not in str(refused.value)


def total(x):
    return x.flatten(1).square().sum(1)


def test_examples_in_docstrings():
    assert doctest.testmod(importlib.import_module("fastebm.losses")) == (0, 31)
