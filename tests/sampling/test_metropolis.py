"""Samplers with kept energies: exact targets, the same bits however a chain is cut, walls, masks, and bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastebm
from tests.sampling.targets import Gaussian, double_well, draw_double_well, kolmogorov_smirnov

MASSES = torch.tensor([0.5, 2.0, 1.0])

SAMPLERS = {
    "MALA": lambda energy, **o: fastebm.MALA(energy, 0.15, **o),
    "MALA, clipped": lambda energy, **o: fastebm.MALA(energy, 0.15, grad_clip=1.0, **o),
    "HMC": lambda energy, **o: fastebm.HMC(energy, 0.45, 3, **o),
    "HMC, jitter": lambda energy, **o: fastebm.HMC(energy, 0.4, 3, jitter=0.5, **o),
    "HMC, masses": lambda energy, **o: fastebm.HMC(energy, 0.4, 3, mass=MASSES, **o),
    "GHMC": lambda energy, **o: fastebm.GHMC(energy, 0.45, persistence=0.7, **o),
    "GHMC, two leapfrogs": lambda energy, **o: fastebm.GHMC(energy, 0.45, 2, persistence=0.7, **o),
    "MALT": lambda energy, **o: fastebm.MALT(energy, 0.45, 3, friction=1.0, **o),
}
UNADJUSTED = {
    "BAOAB": lambda energy, **o: fastebm.Underdamped(energy, 0.15, 1.0, **o),
    "OBABO": lambda energy, **o: fastebm.Underdamped(energy, 0.15, 1.0, scheme="obabo", **o),
    "BAOAB, masses": lambda energy, **o: fastebm.Underdamped(energy, 0.15, 1.0, mass=MASSES, **o),
    "leapfrog": lambda energy, **o: fastebm.Underdamped(energy, 0.15, 0.0, **o),
}
with_a_test = pytest.mark.parametrize("name", SAMPLERS)
every = pytest.mark.parametrize("name", [*SAMPLERS, *UNADJUSTED])


def sampler_of(name, energy, **options):
    return (SAMPLERS | UNADJUSTED)[name](energy, **options)


# The target ---------------------------------------------------------------------------------------------------------


@with_a_test
def test_the_target_is_left_invariant(name):
    """Exact draws stay exact draws, at a step size at which the chain without a test is visibly wrong."""
    start = draw_double_well(4000, 3, seed=1)
    chain = sampler_of(name, double_well)
    rates = []
    x = chain.sample(start, 12, seed=2, keep=lambda k, x, info: rates.append(info.accepted.float().mean()))
    rate = torch.stack(rates).mean()
    assert 0.3 < rate < 0.98, "the test rejects something and lets something pass"
    fresh = draw_double_well(12_000, 1, seed=3)[:, 0]
    for coordinate in range(3):
        assert kolmogorov_smirnov(x[:, coordinate], fresh) > 1e-3
    assert kolmogorov_smirnov(double_well(x), double_well(draw_double_well(4000, 3, seed=4))) > 1e-3
    assert not torch.equal(x, start)


def test_without_the_test_the_same_step_is_biased():
    """At this step size the variance of a chain without a test is 1 / (1 - step / 2), a third too large."""
    target, count = Gaussian((1.0,)), 20_000
    found = {
        "with": fastebm.MALA(target, 0.5).sample(target.draw(count), 10, seed=2),
        "without": fastebm.Langevin(target, 0.5, 1.0).sample(target.draw(count), 10, seed=2),
    }
    error = (2 / count) ** 0.5
    assert abs(float(found["with"].var()) - 1) < 5 * error
    assert abs(float(found["without"].var()) - 1 / 0.75) < 7 * error


@with_a_test
def test_a_temperature_for_each_chain(name):
    heat = torch.tensor([0.25, 4.0]).repeat(3000)
    target = Gaussian((1.0, 0.5, 2.0))
    start = target.draw(6000) * heat.sqrt()[:, None]
    x = sampler_of(name, target, temperature=heat).sample(start, 10, seed=5)
    for i, t in enumerate((0.25, 4.0)):
        found = x[i::2].var(0) / torch.tensor(target.scales).square()
        assert torch.allclose(found, torch.full((3,), t), rtol=0.12)


@with_a_test
def test_bfloat16_gradients_keep_the_target(name):
    """The test compares float32 energies of one function, whatever the gradient's rounding is."""

    class Well(nn.Module):
        def forward(self, x):
            return double_well(x)

    start = draw_double_well(3000, 3, seed=1)
    chain = sampler_of(name, Well(), dtype=torch.bfloat16, engine="autograd")
    x = chain.sample(start, 8, seed=2)
    energies = double_well(x)
    assert kolmogorov_smirnov(energies, double_well(draw_double_well(3000, 3, seed=4))) > 1e-4


@pytest.mark.parametrize("scheme", ["baoab", "obabo"])
def test_moments_of_underdamped_chains_of_a_gaussian(scheme):
    """In closed form: the covariance of (x, v) under the discretised chain is a fixed point of one linear step."""
    h, rate, stiff = 0.8, 0.7, 1.7
    half = h / 2
    kick = torch.tensor([[1.0, 0.0], [-half * stiff, 1.0]], dtype=torch.float64)

    def drift(t):
        return torch.tensor([[1.0, t], [0.0, 1.0]], dtype=torch.float64)

    def mix(t):
        c = torch.exp(torch.tensor(-rate * t, dtype=torch.float64))
        return torch.diag(torch.tensor([1.0, float(c)], dtype=torch.float64)), torch.diag(
            torch.tensor([0.0, float(1 - c**2)], dtype=torch.float64)
        )

    parts = (
        [(kick, None), (drift(half), None), mix(h), (drift(half), None), (kick, None)]
        if scheme == "baoab"
        else [mix(half), (kick, None), (drift(h), None), (kick, None), mix(half)]
    )
    covariance = torch.zeros(2, 2, dtype=torch.float64)
    transient = {}
    for k in range(1, 400):
        for matrix, noise in parts:
            covariance = matrix @ covariance @ matrix.T + (0 if noise is None else noise)
        transient[k] = covariance[0, 0]
    chain = fastebm.Underdamped(lambda x: 0.5 * stiff * x.square().sum(1), h, rate, scheme=scheme)
    count = 40_000
    for k in (1, 3, 60):
        state = chain.init(torch.zeros(count, 1), seed=7, velocity=torch.zeros(count, 1))
        x = chain.advance(state, k).x.double()
        error = 5 * float(transient[k]) * (2 / count) ** 0.5
        assert abs(float(x.square().mean()) - float(transient[k])) < error
    if scheme == "baoab":
        assert abs(float(transient[399]) - 1 / stiff) < 1e-9, "positions have no error for a quadratic energy"


def test_moments_of_langevin_chains_of_a_gaussian():
    eta, stiff, count = 0.3, 1.7, 40_000
    factor, variance = 1 - eta * stiff, 0.0
    chain = fastebm.Langevin(lambda x: 0.5 * stiff * x.square().sum(1), eta, (2 * eta) ** 0.5)
    for k in range(1, 41):
        variance = factor**2 * variance + 2 * eta
        if k in (1, 4, 40):
            x = chain.sample(torch.zeros(count, 1), k, seed=11).double()
            assert abs(float(x.square().mean()) - variance) < 5 * variance * (2 / count) ** 0.5
    assert abs(variance - 1 / (stiff * (1 - eta * stiff / 2))) < 1e-6


# Bits ---------------------------------------------------------------------------------------------------------------


@every
def test_a_chain_has_the_same_bits_however_it_is_cut(name):
    start = draw_double_well(37, 3, seed=1)
    chain = sampler_of(name, double_well)
    whole = chain.sample(start, 9, seed=2)
    assert torch.equal(whole, chain.sample(start, 9, seed=2, batch_size=5))
    assert torch.equal(whole[20:21], chain.sample(start[20:21], 9, seed=2, chain_ids=20))
    state = chain.init(start, seed=2, num_steps=9)
    for _ in range(9):
        state, _ = chain.step(state)
    assert torch.equal(whole, state.x)
    state = chain.advance(chain.init(start, seed=2, num_steps=9), 4)
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.state_dict().items()}
    restored = type(state).from_state_dict(saved)
    assert torch.equal(whole, chain.advance(restored, 5).x)
    assert torch.equal(whole, chain.advance(state, 5).x)


@every
def test_a_chain_has_the_same_bits_on_any_number_of_threads(name):
    start = draw_double_well(2000, 3, seed=1)
    chain = sampler_of(name, double_well)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = chain.sample(start, 5, seed=2)
        torch.set_num_threads(3)
        assert torch.equal(one, chain.sample(start, 5, seed=2))
    finally:
        torch.set_num_threads(threads)


@every
def test_whole_chains_in_one_call_have_the_bits_of_single_steps(name, monkeypatch):
    start = draw_double_well(50, 3, seed=1)
    chain = sampler_of(name, double_well)
    fast = chain.sample(start, 12, seed=2)
    calls = []
    monkeypatch.setattr("fastebm.sampling.metropolis.sampler_steps", lambda *a: (calls.append(1), 0)[1])
    assert torch.equal(fast, chain.sample(start, 12, seed=2))


@every
def test_rows_and_trajectories(name):
    start = draw_double_well(6, 3, seed=1)
    chain = sampler_of(name, double_well)
    frames = chain.sample(start, 6, seed=2, keep="trajectory", thin=2)
    assert frames.shape == (4, 6, 3)
    assert torch.equal(frames[0], start)
    assert torch.equal(frames[-1], chain.sample(start, 6, seed=2))
    assert torch.equal(frames[1], chain.sample(start, 2, seed=2))


@pytest.mark.parametrize("make", [fastebm.MALA, fastebm.HMC, fastebm.GHMC])
def test_a_warm_up_keeps_the_temperatures_of_its_state(make):
    """They are the state's, not the sampler's: tempered replicas carry theirs along, and so do some rows of a state."""
    heat = torch.tensor([0.5, 1.0, 4.0, 1.0])
    options = {"num_leapfrogs": 2} if make is fastebm.HMC else {}
    chain = make(double_well, 0.2, temperature=heat, **options)
    start = draw_double_well(4, 3, seed=1)
    whole = chain.warm_up(chain.init(start, seed=2), 40)
    part = chain.warm_up(chain.init(start, seed=2).rows(1, 3), 40)
    assert torch.equal(part.schedule, whole.schedule[:, 1:3])
    assert torch.equal(chain.advance(part, 5).x, chain.advance(whole, 5).x[1:3])
    if make is fastebm.MALA:
        step_size, noise_std = whole.schedule[0].double().unbind(-1)
        assert torch.allclose(noise_std.square() / (2 * step_size), heat.double(), rtol=1e-6)


@every
def test_no_chains(name):
    chain = sampler_of(name, double_well)
    masked = {"mask": torch.tensor([True, False, False]), "known": torch.zeros(3)}
    for options in ({}, masked):
        assert chain.sample(torch.zeros(0, 3), 4, seed=2, **options).shape == (0, 3)
    state, info = chain.step(chain.init(torch.zeros(0, 3), seed=2))
    assert type(state).from_state_dict(state.state_dict()).step == state.step
    assert info.energy.shape == (0,)


# Options ------------------------------------------------------------------------------------------------------------


@every
def test_masked_entries_stay_and_the_rest_is_conditional(name):
    """Of a correlated Gaussian with one entry known, the others have the conditional moments."""
    precision = torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 1.5]])

    def energy(x):
        return 0.5 * (x @ precision * x).sum(1)

    count = 4000
    mask = torch.tensor([False, True, False])
    known = torch.tensor([0.0, 1.2, 0.0])
    if name == "leapfrog":
        pytest.skip("without friction nothing forgets its start")
    chain = sampler_of(name, energy)
    x = chain.sample(torch.zeros(count, 3), 80, seed=3, mask=mask, known=known)
    assert torch.equal(x[:, 1], known[1].expand(count))
    free = [0, 2]
    inner = precision[free][:, free]
    mean = -torch.linalg.solve(inner, precision[free][:, [1]] @ known[[1]])
    covariance = torch.linalg.inv(inner)
    bias = 0.06 if name in UNADJUSTED else 0.0
    assert torch.allclose(x[:, free].mean(0), mean, atol=0.06)
    assert torch.allclose(x[:, free].T.cov(), covariance, atol=0.06 + bias)


@every
def test_walls_confine_the_target(name):
    """A Gaussian between walls: the moments of the truncated one, and nothing outside."""
    if name == "leapfrog":
        pytest.skip("without friction nothing forgets its start")
    low, high = -0.5, 1.0
    chain = sampler_of(name, lambda x: 0.5 * x.square().sum(1), box=(low, high))
    x = chain.sample(torch.zeros(4000, 3), 60, seed=5)
    assert float(x.min()) >= low
    assert float(x.max()) <= high
    grid = torch.linspace(low, high, 10_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * grid**2)
    mean = float((grid * weight).sum() / weight.sum())
    variance = float((grid**2 * weight).sum() / weight.sum()) - mean**2
    bias = 0.02 if name in UNADJUSTED else 0.0
    assert torch.allclose(x.mean(0), torch.full((3,), mean), atol=0.035 + bias)
    assert torch.allclose(x.var(0), torch.full((3,), variance), atol=0.02 + bias)


@with_a_test
def test_a_proposal_that_is_not_finite_is_rejected_and_flagged(name):
    """log of a negative number outside of the domain: the chain stays inside, and the step says that it diverged."""

    def energy(x):
        return (x.square() - torch.log(1 - x.square())).sum(1)

    chain = sampler_of(name, energy)
    flagged = []
    x = chain.sample(
        torch.zeros(400, 3), 30, seed=1, keep=lambda k, x, info: flagged.append(info.diverged & info.accepted)
    )
    assert float(x.abs().max()) < 1
    assert not torch.stack(flagged).any()


@every
def test_images_and_conditions(name):
    class Energy(nn.Module):
        def forward(self, x, centre):
            return 0.5 * (x - centre[:, :, None, None]).square().flatten(1).sum(1)

    if "masses" in name:
        pytest.skip("its masses are of three numbers")
    centre = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    chain = sampler_of(name, Energy())
    x = chain.sample(torch.zeros(12, 2, 4, 4), 6, seed=1, conditions=(centre,))
    assert x.shape == (12, 2, 4, 4)
    assert torch.equal(x[4:7], chain.sample(torch.zeros(3, 2, 4, 4), 6, seed=1, chain_ids=4, conditions=(centre[4:7],)))


def test_float64_chains():
    for name in (*SAMPLERS, *UNADJUSTED):
        x = sampler_of(name, double_well).sample(draw_double_well(5, 3).double(), 4, seed=1)
        assert x.dtype == torch.float64
        assert x.isfinite().all()


def test_a_score_serves_underdamped_chains_and_is_refused_by_tests():
    score = fastebm.score_gradient(lambda x: -x)
    x = fastebm.Underdamped(score, 0.5, 1.0).sample(torch.zeros(4000, 2), 40, seed=1)
    assert torch.allclose(x.var(0), torch.ones(2), atol=0.1)
    for make in (fastebm.MALA, lambda e, h: fastebm.HMC(e, h, 2)):
        with pytest.raises(TypeError, match="a score tells none"):
            make(score, 0.1)


def test_hmc_goes_on_from_a_state_of_malt_that_is_handed_over():
    """Without its name. Of the other's schedule it reads the step size alone, in calls of many steps too."""
    start = draw_double_well(20, 3, seed=1)
    state = fastebm.MALT(double_well, 0.4, 3, friction=2.0).init(start, seed=2)
    chain = fastebm.HMC(double_well, 0.4, 3)
    with pytest.raises(TypeError, match="HMC goes on from its own states, got one of MALT"):
        chain.advance(state, 6)
    assert torch.equal(chain.advance(replace(state, sampler=""), 6).x, chain.sample(start, 6, seed=2))


@pytest.mark.parametrize("name", ["MALA", "HMC", "BAOAB", "OBABO"])
def test_a_row_far_behind_the_end_of_a_schedule_is_its_last(name):
    chain, start = sampler_of(name, double_well), draw_double_well(5, 3, seed=1)
    late = replace(chain.init(start, seed=2), key=torch.tensor([2, 0, 2**63 - 20]))
    assert torch.equal(chain.advance(late, 8).x, chain.sample(start, 8, seed=2))


def test_new_weights_are_read_where_the_state_has_no_energy():
    net = nn.Linear(3, 1)
    chain = fastebm.MALA(lambda x: net(x).square().sum(1) + 0.5 * x.square().sum(1), 0.1)
    state = chain.advance(chain.init(torch.zeros(4, 3), seed=1), 2)
    with torch.no_grad():
        net.bias.add_(3.0)
    fresh = chain.advance(replace(state, energy=None, gradient=None), 1)
    again, _ = chain.step(replace(state, energy=None, gradient=None))
    assert torch.equal(fresh.x, again.x)
    assert not torch.equal(fresh.energy, state.energy)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda e: fastebm.MALA(e, 0.0), ValueError, "step_size must be finite and positive"),
        (lambda e: fastebm.MALA(e, -1.0), ValueError, "step_size must be finite and positive"),
        (lambda e: fastebm.MALA(e, 0.1, temperature=0.0), ValueError, "temperature must be finite and positive"),
        (lambda e: fastebm.HMC(e, 0.1, 2, temperature=0.0), ValueError, "temperature must be finite and positive"),
        (
            lambda e: fastebm.MALT(e, 0.1, 2, temperature=torch.tensor([1.0, 0.0])),
            ValueError,
            "temperature must be finite and positive",
        ),
        (lambda e: fastebm.MALA(e, 0.1, box=(1.0, 0.0)), ValueError, "low < high"),
        (lambda e: fastebm.MALA(e, 0.1, box=3.0), TypeError, r"box must be \(low, high\)"),
        (lambda e: fastebm.MALA(e, 0.1, grad_clip=-1), ValueError, "grad_clip must be positive"),
        (lambda e: fastebm.HMC(e, 0.1, 0), ValueError, "num_leapfrogs must be at least 1"),
        (lambda e: fastebm.HMC(e, 0.1, 2.5), TypeError, "num_leapfrogs must be an integer"),
        (lambda e: fastebm.HMC(e, 0.1, 2, jitter=1.0), ValueError, r"jitter must be in \[0, 1\)"),
        (lambda e: fastebm.HMC(e, 0.1, 2, mass=0.0), ValueError, "mass must be finite and positive, got 0.0"),
        (
            lambda e: fastebm.HMC(e, 0.1, 2, mass=torch.tensor([1.0, -1.0])),
            ValueError,
            "mass must be finite and positive",
        ),
        (lambda e: fastebm.GHMC(e, 0.1, persistence=1.0), ValueError, r"persistence must be in \[0, 1\)"),
        (lambda e: fastebm.MALT(e, 0.1, 2, friction=-1.0), ValueError, "friction must be finite and not negative"),
        (lambda e: fastebm.Underdamped(e, 0.1, -0.1), ValueError, "friction must be finite and not negative"),
        (lambda e: fastebm.Underdamped(e, 0.1, 1.0, scheme="euler"), ValueError, '"baoab" or "obabo"'),
        (lambda e: fastebm.Underdamped(e, torch.ones(2), torch.ones(3)), ValueError, "different numbers of chains"),
    ],
)
def test_bad_options_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make(double_well)


@every
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"x0": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "float32 or float64"),
        ({"x0": torch.zeros(())}, ValueError, r"\(B, ...\)"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "mask and known come together"),
        ({"mask": torch.ones(4, dtype=torch.bool), "known": torch.zeros(3)}, ValueError, "mask must broadcast"),
        ({"chain_ids": torch.arange(5)}, ValueError, "one id a chain"),
        ({"conditions": (torch.zeros(7, 1),)}, ValueError, "one row for each of 2 samples"),
        ({"num_chains": 3}, ValueError, "only a single one can be repeated"),
        ({"num_steps": -1}, ValueError, "num_steps must not be negative"),
        ({"start_step": 2**32}, ValueError, "leave the range"),
        ({"keep": "all"}, ValueError, "keep is"),
        ({"thin": 0}, ValueError, "thin must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_chains_run(name, options, error, words):
    with pytest.raises(error, match=words):
        sampler_of(name, double_well).sample(**{"x0": torch.zeros(2, 3), "num_steps": 2} | options)


def test_starts_outside_of_the_walls_are_refused():
    with pytest.raises(ValueError, match="x0 must lie inside of the box"):
        fastebm.MALA(double_well, 0.1, box=(-1, 1)).sample(torch.full((1, 2), 2.0), 1)


def test_masses_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="mass must be a number, broadcast to one sample"):
        fastebm.HMC(double_well, 0.1, 2, mass=torch.ones(4)).sample(torch.zeros(2, 3), 1)


def test_chains_that_diverge_say_so():
    with pytest.raises(FloatingPointError, match="are not finite"):
        fastebm.Underdamped(lambda x: -x.pow(4).sum(1), 1.0, 0.1).sample(torch.ones(2, 3) * 3, 60, seed=1)


@every
def test_states_that_do_not_fit_are_refused(name):
    chain = sampler_of(name, double_well)
    state = chain.advance(chain.init(torch.zeros(2, 3), seed=1), 1).state_dict()
    for broken, words in (
        ({"energy": torch.zeros(3)}, "energy must have shape"),
        ({"gradient": torch.zeros(2, 4)}, "gradient must have x's shape"),
        ({"schedule": torch.zeros(1, 2, dtype=torch.float64)}, "schedule is a float32 table"),
        ({"schedule": torch.full((1, 3), float("nan"))}, "must be finite"),
        ({"schedule": -chain.init(torch.zeros(2, 3), seed=1).schedule}, "schedule has positive numbers"),
        ({"mask": torch.zeros(2, 3)}, "mask must be torch.bool"),
        ({"x": None}, "missing"),
        ({"step": 9}, "stands at step"),
        ({"odd": 1}, "unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            type(chain.init(torch.zeros(2, 3), seed=1)).from_state_dict(state | broken)
    if "temperature" in state:
        for heat in (torch.ones(1, 3), torch.full((1,), -1.0), torch.ones(1).double(), torch.ones(1, 2) * torch.nan):
            with pytest.raises(ValueError, match="a chain's temperature is a float32 table"):
                type(chain.init(torch.zeros(2, 3), seed=1)).from_state_dict(state | {"temperature": heat})


# Warm-up ------------------------------------------------------------------------------------------------------------


@with_a_test
def test_a_warm_up_meets_its_acceptance_for_each_chain(name):
    """Targets of very different scales side by side: each chain finds its own step size."""
    scale = torch.tensor([0.1, 1.0, 10.0]).repeat(40)

    def energy(x, scale):
        return 0.5 * (x / scale).square().sum(1)

    if "masses" in name:
        pytest.skip("the same as without")
    chain = sampler_of(name, energy) if "clipped" not in name else fastebm.MALA(energy, 0.15)
    start = torch.randn(120, 30, generator=torch.Generator().manual_seed(0)) * scale[:, None]
    state = chain.init(start, seed=1, conditions=(scale[:, None],))
    warm = chain.warm_up(state, 400)
    assert warm.warmed_up == 400
    rates = []
    chain.run_with_callback(warm, 60, lambda k, x, info: rates.append(info.acceptance_probability))
    rate = torch.stack(rates).mean(0).view(40, 3).mean(0)
    assert torch.allclose(rate, torch.full((3,), chain.target_acceptance, dtype=rate.dtype), atol=0.08)
    steps = warm.schedule[0, :, 0].view(40, 3).log().mean(0).exp()
    power = 2 if name.startswith("MALA") else 1
    assert torch.allclose(steps[1:] / steps[:-1], torch.tensor([10.0**power] * 2), rtol=0.35)


@with_a_test
def test_a_warm_up_does_not_depend_on_the_batch(name):
    start = draw_double_well(9, 3, seed=1)
    chain = sampler_of(name, double_well)
    whole = chain.warm_up(chain.init(start, seed=2), 30)
    part = chain.warm_up(chain.init(start[4:6], seed=2, chain_ids=4), 30)
    assert torch.equal(whole.x[4:6], part.x)
    assert torch.equal(whole.schedule[:, 4:6], part.schedule)
    pooled = chain.warm_up(chain.init(start, seed=2), 30, pooled=True)
    assert len(pooled.schedule[0, :, 0].unique()) == 1
    assert torch.equal(chain.advance(whole, 3).schedule, whole.schedule), "it is frozen"


@pytest.mark.parametrize("name", ["HMC", "GHMC", "MALT"])
def test_a_warm_up_learns_masses(name):
    target = Gaussian((0.1, 1.0, 10.0))
    chain = sampler_of(name, target)
    warm = chain.warm_up(chain.init(target.draw(400), seed=2), 200, mass="diagonal")
    ratio = warm.inverse_mass[0] / torch.tensor(target.scales).square()
    assert torch.allclose(ratio, torch.ones(3), rtol=0.3)
    x = chain.advance(warm, 60).x
    assert torch.allclose(x.std(0) / torch.tensor(target.scales), torch.ones(3), rtol=0.15)


@pytest.mark.parametrize("make", [fastebm.MALT, fastebm.Underdamped], ids=["MALT", "Underdamped"])
@pytest.mark.parametrize("options", [{}, {"scheme": "obabo"}], ids=["", "obabo"])
def test_a_warm_up_of_some_chains_keeps_the_friction_of_each(make, options):
    """The sampler knows the friction of all chains, and asked for as many."""
    if make is fastebm.MALT and options:
        pytest.skip("MALT has one scheme")
    rates, heat = torch.tensor([1e-4, 0.1, 1.0, 5.0, 30.0]), torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0])
    number = {"num_leapfrogs": 3} if make is fastebm.MALT else {}
    chain = make(double_well, 0.2, friction=rates, temperature=heat, **number, **options)
    state = chain.init(draw_double_well(5, 3, seed=1), seed=2)
    whole = chain.warm_up(state, 30)
    for first, last in ((0, 2), (2, 5)):
        part = chain.warm_up(state.rows(first, last), 30)
        assert torch.equal(part.x, whole.x[first:last])
        assert torch.equal(part.schedule, whole.schedule[:, first:last])
    h, decay, noise_std = whole.schedule[0].double().unbind(-1)
    time = h if options == {} and make is fastebm.Underdamped else h / 2
    assert torch.allclose(decay, (-rates * time).exp(), rtol=1e-5, atol=1e-7)
    expected = (-torch.expm1(-2 * rates.double() * time) * heat).sqrt()
    assert torch.allclose(noise_std, expected, rtol=1e-5)


KINETIC = {"baoab": ("baoab", 1.0), "obabo": ("obabo", 1.0), "without friction": ("baoab", 0.0)}


@pytest.mark.parametrize("pooled", [False, True], ids=["each", "pooled"])
@pytest.mark.parametrize("kind", KINETIC)
def test_an_underdamped_warm_up_meets_its_energy_error(kind, pooled):
    """A normal distribution of scale s, where the error of a leapfrog step is `(h / s)^3 / 4` times a product of two
    standard normal numbers in each dimension: the step is `s (16 target)^(1/6)`. Noise in the middle shortens it, and
    without friction a chain's own depends on the energy that it started with."""
    scheme, friction = KINETIC[kind]
    scale, target, d = torch.tensor([0.2, 5.0]).repeat(50), 1e-4, 25

    def energy(x, scale):
        return 0.5 * (x / scale).square().sum(1)

    if pooled:
        scale = torch.full((100,), 0.2)
    noise = torch.randn(100, d, generator=torch.Generator().manual_seed(0))
    chain = fastebm.Underdamped(energy, 0.01, friction, scheme=scheme)
    state = chain.init(noise * scale[:, None], seed=1, conditions=[scale[:, None]])
    warm = chain.warm_up(state, 300, target=target, pooled=pooled)
    assert warm.warmed_up == 300
    assert warm.step == 300
    h = warm.schedule[0, :, 0] / scale
    expected = (16 * target) ** (1 / 6)
    if scheme == "obabo" or (pooled and not friction):
        assert abs(float(h.mean()) / expected - 1) < 0.03
    assert bool(((h > 0.5 * expected) & (h < (1.2 if friction else 1.6) * expected)).all())
    assert (len(h.unique()) == 1) is pooled
    after = chain.advance(warm, 3)
    assert torch.equal(after.schedule, warm.schedule), "it is frozen"
    errors = [chain._step_error_(after) for _ in range(60)]
    mean = float(torch.stack(errors).square().mean()) / d
    assert 0.8 * target < mean < 1.2 * target


@pytest.mark.parametrize("scheme", ["baoab", "obabo"])
def test_the_energy_error_is_what_is_no_heat(scheme):
    """Against the parts of a step one by one in float64; without noise it is the change of the total energy."""
    mass, h, rate = MASSES.double(), 0.3, 1.5
    chain = fastebm.Underdamped(double_well, h, rate, scheme=scheme, mass=mass, engine="autograd")
    state = chain.advance(chain.init(draw_double_well(6, 3, seed=1).double(), seed=2), 2)
    x, v, (energy, g) = state.x.clone(), state.velocity.clone(), (part.clone() for part in state.kept)
    h, c, sigma = state.schedule[0].double().tolist()
    error = chain._step_error_(state)

    def heat(stream, step):
        noise = fastebm.ops.normal((6, 3), seed=2, step=step, stream=stream, dtype=torch.float64)
        return c * v + sigma / mass.sqrt() * noise

    def kinetic():
        return 0.5 * (mass * v.square()).sum(1)

    def slope(x):
        return 4 * x * (x.square() - 1)

    streams, work = fastebm.rng.Stream, 0.0
    if scheme == "obabo":
        v = heat(streams.MOMENTUM, 2)
    work, v = work - kinetic(), v - h / 2 / mass * g
    work = work + kinetic()
    if scheme == "baoab":
        x = x + h / 2 * v
        v = heat(streams.MOMENTUM, 2)
        x = x + h / 2 * v
    else:
        x = x + h * v
    work, v = work - kinetic(), v - h / 2 / mass * slope(x)
    work = work + kinetic()
    if scheme == "obabo":
        v = heat(streams.MOMENTUM_END, 2)
    torch.testing.assert_close(state.x, x)
    torch.testing.assert_close(state.velocity, v)
    torch.testing.assert_close(error, double_well(x) - energy + work, rtol=0, atol=1e-6)


def test_an_underdamped_warm_up_does_not_depend_on_the_batch_and_goes_on_from_a_saved_state():
    chain, start = fastebm.Underdamped(double_well, 0.2, 1.0, box=(-2.0, 2.0)), draw_double_well(9, 3, seed=1)
    start = start.clamp(-2, 2)
    whole = chain.warm_up(chain.init(start, seed=2), 30)
    part = chain.warm_up(chain.init(start[4:6], seed=2, chain_ids=4), 30)
    assert torch.equal(whole.x[4:6], part.x)
    assert torch.equal(whole.velocity[4:6], part.velocity)
    assert torch.equal(whole.schedule[:, 4:6], part.schedule)
    again = chain.load_state(whole.state_dict())
    assert again.warmed_up == 30
    assert torch.equal(chain.advance(again, 5).x, chain.advance(whole, 5).x)


def test_an_underdamped_warm_up_comes_back_from_steps_that_fail():
    """From a step at which the energy overflows, and with entries that are held."""
    chain, start = fastebm.Underdamped(double_well, 50.0, 1.0), draw_double_well(20, 3, seed=1)
    mask = torch.tensor([True, False, False])
    warm = chain.warm_up(chain.init(start, seed=2, mask=mask, known=torch.tensor(0.5).expand(3)), 200)
    assert bool(warm.x.isfinite().all())
    assert bool((warm.x[:, 0] == 0.5).all())
    steps = warm.schedule[0, :, 0]
    assert 0.05 < float(steps.min()) < float(steps.max()) < 0.5


def test_an_underdamped_warm_up_without_any_error_keeps_its_numbers_in_range():
    """Where all entries are held, or the energy is constant, the step size grew without end."""
    chain = fastebm.Underdamped(double_well, 0.1, 1.0)
    held = {"mask": torch.ones(4, 3, dtype=torch.bool), "known": torch.zeros(4, 3)}
    warm = chain.warm_up(chain.init(torch.zeros(4, 3), seed=0, **held), 400)
    assert torch.equal(warm.x, torch.zeros(4, 3))
    assert bool(warm.schedule.isfinite().all())
    for pooled in (False, True):
        flat = fastebm.Underdamped(lambda x: 0 * x.sum(1), 0.1, 1.0)
        warm = flat.warm_up(flat.init(torch.zeros(4, 3), seed=0), 400, pooled=pooled)
        assert bool(warm.x.isfinite().all())
        assert bool(warm.schedule.isfinite().all())


def test_an_underdamped_warm_up_learns_masses():
    target = Gaussian((0.1, 1.0, 10.0))
    chain = fastebm.Underdamped(target, 0.05, 1.0)
    warm = chain.warm_up(chain.init(target.draw(400), seed=2), 200, mass="diagonal")
    ratio = warm.inverse_mass[0] / torch.tensor(target.scales).square()
    assert torch.allclose(ratio, torch.ones(3), rtol=0.3)
    x = chain.advance(warm, 60).x
    assert torch.allclose(x.std(0) / torch.tensor(target.scales), torch.ones(3), rtol=0.15)


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (lambda e: fastebm.MALA(e, 0.1), {"num_steps": 10}, ValueError, "num_steps must be at least 20"),
        (lambda e: fastebm.MALA(e, 0.1), {"target_acceptance": 1.0}, ValueError, r"must be in \(0, 1\)"),
        (lambda e: fastebm.MALA(e, 0.1), {"mass": "diagonal"}, TypeError, "MALA has no masses"),
        (lambda e: fastebm.HMC(e, 0.1, 2), {"mass": "dense"}, ValueError, '"given" or "diagonal"'),
        (lambda e: fastebm.Underdamped(e, 0.1, 1.0), {"target": 0.0}, ValueError, "target must be finite and positive"),
        (lambda e: fastebm.Underdamped(e, 0.1, 1.0), {"num_steps": 19}, ValueError, "num_steps must be at least 20"),
        (lambda e: fastebm.Underdamped(e, 0.1, 1.0), {"mass": "dense"}, ValueError, '"given" or "diagonal"'),
        (lambda e: fastebm.Underdamped(e, 0.1, 1.0, temperature=0.0), {}, ValueError, "temperatures above 0"),
        (
            lambda e: fastebm.Underdamped(fastebm.score_gradient(lambda x: -x), 0.1, 1.0),
            {},
            TypeError,
            "a score tells none",
        ),
        (
            lambda e: fastebm.MALA(e, fastebm.schedules.linear(0.1, 0.2)),
            {},
            ValueError,
            "options that don't change along the chain",
        ),
    ],
)
def test_warm_ups_that_cannot_work_are_refused(make, options, error, words):
    chain = make(double_well)
    with pytest.raises(error, match=words):
        chain.warm_up(chain.init(torch.zeros(2, 3), seed=1, num_steps=5), **{"num_steps": 20} | options)


def test_a_proposal_beyond_a_wall_is_no_error_of_its_energy():
    """And walls have no temperature that a verdict could judge."""
    mala = fastebm.MALA(lambda x: 4 * x.sum(1), 0.1, box=(0, 1))
    x, summary = mala.sample(torch.rand(500, 4), 100, seed=0, diagnostics=True)
    assert summary.energy_error.mean.isfinite().all()
    assert not summary.divergences.any()
    assert not any("diverge" in line or "have the temperature" in line for line in summary.verdict())
    info = mala.step(mala.init(torch.rand(500, 4), seed=1))[1]
    beyond = info.log_ratio == -math.inf
    assert beyond.any()
    assert not info.accepted[beyond].any()
    assert not info.diverged.any()
    assert (info.energy_error == torch.where(beyond, 0.0, -info.log_ratio)).all()
    assert (x >= 0).all()
    assert (x <= 1).all()
