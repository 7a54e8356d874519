"""Samplers that are made of a proposal: exact targets, bits of chains that are cut, masks, conditions, bad input."""

from __future__ import annotations

import pytest
import torch

import fastebm
from fastebm.sampling import MetropolisInfo, ProposalSampler, StepNoise
from tests.sampling.targets import double_well, draw_double_well, kolmogorov_smirnov


class RandomWalk(ProposalSampler):
    target_acceptance = 0.234

    def propose(self, x, gradient, step_size, noise):
        return x + step_size * noise.normal()


class Drift(ProposalSampler):
    """MALA, by hand."""

    def propose(self, x, gradient, step_size, noise):
        return x - step_size * gradient + (2 * step_size).sqrt() * noise.normal()

    def log_proposal_ratio(self, x, gradient, proposal, proposal_gradient, step_size):
        there = (proposal - x + step_size * gradient).square() / (4 * step_size)
        back = (x - proposal + step_size * proposal_gradient).square() / (4 * step_size)
        return there - back


class DriftByChain(Drift):
    def log_proposal_ratio(self, *arguments):
        return super().log_proposal_ratio(*arguments).double().sum(1)


class Forgetful(Drift):
    """Leaves out that its proposals are not symmetric."""

    def log_proposal_ratio(self, *arguments):
        return 0.0


KINDS = {"random walk": (RandomWalk, 0.4), "drift": (Drift, 0.12), "drift, by chain": (DriftByChain, 0.12)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_left_invariant(kind):
    made, step_size = KINDS[kind]
    rates = []
    x = made(double_well, step_size).sample(
        draw_double_well(3000, 3, seed=1), 12, seed=2, keep=lambda k, x, info: rates.append(info.accepted.float())
    )
    assert 0.3 < torch.stack(rates).mean() < 0.98
    fresh = draw_double_well(12_000, 1, seed=3)[:, 0]
    for coordinate in range(3):
        assert kolmogorov_smirnov(x[:, coordinate], fresh) > 1e-3


def test_a_ratio_that_is_left_out_is_seen():
    """The same proposals as `Drift`, taken for symmetric, miss the target: so the test above can fail."""
    x = Forgetful(double_well, 0.12).sample(draw_double_well(12_000, 3, seed=1), 40, seed=2)
    assert kolmogorov_smirnov(x[:, 0], draw_double_well(12_000, 1, seed=3)[:, 0]) < 1e-6


def test_it_accepts_as_mala_does():
    """Two writings of one sampler: the ratios at one state and noise are those of the formula of `MALA`."""
    start = draw_double_well(20_000, 3, seed=1)
    ours, theirs = (made(double_well, 0.12) for made in (Drift, fastebm.MALA))
    rates = [sampler.step(sampler.init(start, seed=2))[1].acceptance_probability.mean() for sampler in (ours, theirs)]
    assert abs(rates[0] - rates[1]) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_temperature_scales_the_target(dtype):
    sampler = RandomWalk(lambda x: 0.5 * x.square().sum(1), 2.0, temperature=4.0, engine="autograd")
    x = sampler.sample(torch.zeros(4000, 2, dtype=dtype), 60, seed=0)
    assert x.dtype == dtype
    assert (x.std(0) - 2).abs().max() < 0.1


def test_a_cut_chain_has_the_same_bits():
    sampler = RandomWalk(double_well, 0.4)
    start = draw_double_well(33, 3, seed=1)
    whole = sampler.sample(start, 20, seed=5)
    assert torch.equal(sampler.sample(start, 20, seed=5, batch_size=7), whole)
    state = sampler.advance(sampler.init(start, seed=5), 11)
    state = sampler.load_state(state.state_dict())
    stepped = state
    for _ in range(9):
        stepped, info = sampler.step(stepped)
    assert isinstance(info, MetropolisInfo)
    assert torch.equal(stepped.x, whole)
    assert torch.equal(sampler.advance(state, 9).x, whole)


def test_masks_and_conditions():
    def energy(x, center):
        return 0.5 * (x - center).square().sum(1) + 0.9 * x[:, 0] * x[:, 1]

    mask = torch.tensor([True, False])
    center = torch.tensor([[0.0, 1.0]]).expand(3000, 2)
    x = Drift(energy, 0.5).sample(
        torch.zeros(3000, 2), 30, seed=0, mask=mask, known=torch.tensor([1.0, 0.0]), conditions=[center]
    )
    assert (x[:, 0] == 1).all()
    assert abs(x[:, 1].mean() - 0.1) < 0.1
    assert abs(x[:, 1].std() - 1) < 0.07


def test_warm_up_finds_the_acceptance():
    sampler = RandomWalk(double_well, 5.0)
    state = sampler.warm_up(sampler.init(draw_double_well(200, 3, seed=1), seed=3), 300)
    rates = []
    sampler.run(state, 50, keep=lambda k, x, info: rates.append(info.accepted.float().mean()))
    assert abs(torch.stack(rates).mean() - 0.234) < 0.06


def test_noise_of_each_use_is_its_own():
    state = RandomWalk(double_well, 0.4).init(torch.zeros(400, 50), seed=3, start_step=9)
    noise = StepNoise(state)
    drawn = [*(noise.normal(use) for use in (0, 1, 63)), *(noise.uniform(use) for use in (0, 1, 63))]
    together = torch.corrcoef(torch.stack([each.flatten() for each in drawn])) - torch.eye(6)
    assert together.abs().max() < 0.03
    expected = fastebm.ops.normal((400, 50), seed=3, step=9, stream=fastebm.rng.own_stream(1))
    assert torch.equal(drawn[1], expected)
    for wrong in (-1, 64):
        with pytest.raises(ValueError, match=r"use must be in \[0, 64\)"):
            noise.uniform(wrong)


def test_bad_input_is_refused():
    class Narrow(RandomWalk):
        def propose(self, x, gradient, step_size, noise):
            return x[:, :1]

    class Wide(RandomWalk):
        def log_proposal_ratio(self, *arguments):
            return torch.zeros(3, 1)

    class InPlace(RandomWalk):
        def propose(self, x, gradient, step_size, noise):
            return x.add_(step_size * noise.normal())

    class Complex(RandomWalk):
        def propose(self, x, gradient, step_size, noise):
            return x + 1j

    class Forgetful(RandomWalk):
        def log_proposal_ratio(self, *arguments):
            torch.zeros(3)

    start = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"InPlace.propose wrote to x"):
        InPlace(double_well, 0.4).sample(start, 1, seed=0)
    with pytest.raises(ValueError, match=r"Complex.propose must give a floating-point tensor \(3, 2\), got"):
        Complex(double_well, 0.4).sample(start, 1, seed=0)
    with pytest.raises(ValueError, match=r"Forgetful.log_proposal_ratio must give a tensor or a number, got None"):
        Forgetful(double_well, 0.4).sample(start, 1, seed=0)
    with pytest.raises(ValueError, match=r"Narrow.propose must give a floating-point tensor \(3, 2\), got"):
        Narrow(double_well, 0.4).sample(start, 1, seed=0)
    with pytest.raises(ValueError, match=r"Wide.log_proposal_ratio must give \(3,\) or \(3, 2\), got"):
        Wide(double_well, 0.4).sample(start, 1, seed=0)
    with pytest.raises(ValueError, match="step_size must be finite and positive"):
        RandomWalk(double_well, 0.0)
    with pytest.raises(TypeError, match="RandomWalk"):
        RandomWalk(fastebm.score_gradient(lambda x: -x), 0.4)
    with pytest.raises(TypeError, match="abstract"):
        ProposalSampler(double_well, 0.4)
