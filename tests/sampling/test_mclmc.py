"""Microcanonical chains: stationary moments, an exact target with the test, the same bits however a chain is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastebm
from fastebm.sampling.mclmc import AdjustedState, MicrocanonicalState


def gaussian(scales: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: 0.5 * (x / scales.to(x.dtype)).square().sum(1)


def normal(x: Tensor) -> Tensor:
    return 0.5 * x.square().flatten(1).sum(1)


def double_well(x: Tensor) -> Tensor:
    """`(x^2 - 1)^2` in each coordinate, whose draws are known."""
    return (x.square() - 1).square().sum(1)


def draw_double_well(count: int, size: int, seed: int) -> Tensor:
    """Exact draws, by rejection from a uniform density over [-3, 3]."""
    generator, found = torch.Generator().manual_seed(seed), torch.zeros(0)
    while len(found) < count * size:
        x, u = 6 * torch.rand(10**6, generator=generator) - 3, torch.rand(10**6, generator=generator)
        found = torch.cat((found, x[u < torch.exp(-((x**2 - 1) ** 2))]))
    return found[: count * size].reshape(count, size)


def ranks_are_uniform(values: Tensor, exact: Tensor) -> float:
    """The p-value of Kolmogorov and Smirnov for two samples, from the first term of the series."""
    both = torch.cat((values, exact)).sort().values
    shares = [torch.searchsorted(s.sort().values, both, right=True) / len(s) for s in (values, exact)]
    root = math.sqrt(len(values) * len(exact) / (len(values) + len(exact)))
    return min(1.0, 2 * math.exp(-2 * (root * float((shares[0] - shares[1]).abs().max())) ** 2))


SAMPLERS: dict[str, Callable[..., Any]] = {
    "MCLMC": lambda energy, **o: fastebm.MCLMC(energy, 0.7, 2.0, **o),
    "adjusted": lambda energy, **o: fastebm.AdjustedMCLMC(energy, 0.9, 3, **o),
    "adjusted, jitter": lambda energy, **o: fastebm.AdjustedMCLMC(energy, 0.9, 3, jitter=0.5, **o),
}
both = pytest.mark.parametrize("name", SAMPLERS)


# What they sample ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 10, 100])
def test_stationary_moments_of_gaussians(dimensions):
    """Within three standard errors and the bias of the step size, at a tenth of the usual energy error."""
    scales = torch.linspace(0.5, 2, dimensions)
    sampler = fastebm.MCLMC(gaussian(scales), 0.5)
    chains = 400
    start = scales * torch.randn(chains, dimensions, generator=torch.Generator().manual_seed(3))
    state = sampler.warm_up(sampler.init(start, 1), 300, target=5e-5)
    kept: list[Tensor] = []
    sampler.run(state, 400, thin=2, keep=lambda k, x, info: kept.append(x / scales))
    samples = torch.stack(kept).double()
    for values, truth in ((samples, 0.0), (samples.square(), 1.0)):
        of_chains = values.mean(0)  # independent of each other
        error = of_chains.std(0) / math.sqrt(chains)
        bias = 0.0 if truth == 0 else 0.06
        assert bool(((of_chains.mean(0) - truth).abs() < 4 * error + bias).all())


@pytest.mark.parametrize("dimensions", [2, 10, 100])
@pytest.mark.parametrize("trajectory_steps", [1, 4])
def test_the_adjusted_one_has_no_bias(dimensions, trajectory_steps):
    """At steps where the other one is off by more than this test would let pass."""
    scales = torch.linspace(0.5, 2, dimensions)
    sampler = fastebm.AdjustedMCLMC(gaussian(scales), 0.9 * math.sqrt(dimensions), trajectory_steps, jitter=0.3)
    start = scales * torch.randn(2000, dimensions, generator=torch.Generator().manual_seed(3))
    rates: list[Tensor] = []
    squares = torch.zeros(2000, dimensions, dtype=torch.float64)

    def keep(k: int, x: Tensor, info: Any) -> None:
        rates.append(info.accepted.double().mean())
        squares.add_((x / scales).double().square() / 30)

    sampler.sample(start, 30, seed=2, keep=keep)
    assert 0.2 < torch.stack(rates).mean() < 0.99
    error = squares.std(0) / math.sqrt(2000)
    assert bool(((squares.mean(0) - 1).abs() < 4.5 * error).all())


@pytest.mark.parametrize("options", [{}, {"jitter": 0.5}, {"mass": torch.tensor([0.5, 2.0, 1.0])}, {"temperature": 1}])
@pytest.mark.parametrize("trajectory_steps", [1, 3])
def test_the_target_is_left_invariant(trajectory_steps, options):
    """Exact draws of 4,000 chains stay exact draws; without the test they would not."""
    start, exact = draw_double_well(4000, 3, seed=1), draw_double_well(4000, 3, seed=4)
    sampler = fastebm.AdjustedMCLMC(double_well, 0.9 if trajectory_steps == 3 else 1.3, trajectory_steps, **options)
    rates: list[Tensor] = []
    x = sampler.sample(start, 12, seed=2, keep=lambda k, x, info: rates.append(info.accepted.float().mean()))
    assert 0.3 < torch.stack(rates).mean() < 0.98
    assert not torch.equal(x, start)
    for values, truth in ((x.T, exact.T), (double_well(x)[None], double_well(exact)[None])):
        for of_x, of_exact in zip(values, truth, strict=True):
            assert ranks_are_uniform(of_x, of_exact) > 1e-3


def test_without_the_test_the_same_step_is_biased():
    start, exact = draw_double_well(4000, 3, seed=1), draw_double_well(4000, 3, seed=4)
    x = fastebm.MCLMC(double_well, 1.6, 2.0).sample(start, 40, seed=2)
    assert ranks_are_uniform(double_well(x), double_well(exact)) < 1e-6


def test_bfloat16_gradients_keep_the_target():
    class Well(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return double_well(x)

    sampler = fastebm.AdjustedMCLMC(Well(), 0.8, 2, dtype=torch.bfloat16, engine="autograd")
    x = sampler.sample(draw_double_well(3000, 3, seed=1), 8, seed=2)
    assert ranks_are_uniform(double_well(x), double_well(draw_double_well(3000, 3, seed=4))) > 1e-4


@both
def test_a_temperature_for_each_chain(name):
    heat = torch.tensor([0.25, 4.0]).repeat(1500)
    scale = heat.sqrt()[:, None]
    start = scale * torch.randn(3000, 5, generator=torch.Generator().manual_seed(0))
    options = {"step_size": 0.5 * heat.sqrt(), "temperature": heat}
    if name == "MCLMC":
        sampler = fastebm.MCLMC(normal, decoherence_length=2 * heat.sqrt(), **options)
    else:
        sampler = fastebm.AdjustedMCLMC(normal, trajectory_steps=3, jitter=0.5 * ("jitter" in name), **options)
    x = sampler.sample(start, 30, seed=5) / scale
    for i in range(2):
        torch.testing.assert_close(x[i::2].var(0), torch.ones(5), rtol=0, atol=0.15)
    cold = fastebm.AdjustedMCLMC(normal, 0.25, 3, temperature=0.25).sample(start[::2], 30, seed=5)
    assert abs(float(cold.var()) - 0.25) < 0.02


@pytest.mark.parametrize("name", ["MCLMC", "adjusted"])
def test_tempered_chains_find_both_modes(name):
    """Where plain ones don't; the momentum and what is left of a step go on through a swap of temperatures."""

    def wells(x: Tensor) -> Tensor:
        return 8 * (x[:, 0].square() - 1).square() + 0.5 * x[:, 1:].square().sum(1)

    def kernel(energy: Any, heat: Tensor) -> Any:
        if name == "MCLMC":
            return fastebm.MCLMC(energy, 0.2 * heat.sqrt(), 2 * heat.sqrt(), temperature=heat)
        return fastebm.AdjustedMCLMC(energy, 0.3 * heat.sqrt(), 3, temperature=heat)

    start = torch.ones(300, 2)
    tempered = fastebm.ParallelTempering(wells, (1.0, 2.5, 6.0, 15.0), kernel, swap_every=2)
    x = tempered.sample(start, 400, seed=1)
    assert abs(float((x[:, 0] < 0).float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(300)
    assert abs(float(x[:, 1].var()) - 1) < 0.4
    plain = kernel(fastebm.energy_gradient(wells), torch.ones(300)).sample(start, 400, seed=1)
    assert float((plain[:, 0] < 0).float().mean()) < 0.2
    again = fastebm.ParallelTempering(wells, (1.0, 2.5, 6.0, 15.0), kernel, swap_every=2)
    assert torch.equal(again.sample(start[:3], 400, seed=1), x[:3])


def test_the_energy_error_vanishes_with_the_step():
    """By the square of it, as an integrator of second order conserves the energy over a path."""
    start = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).double()
    errors = []
    for steps in (2, 4, 8):
        sampler = fastebm.AdjustedMCLMC(double_well, 0.4 / steps, steps)
        _, info = sampler.step(sampler.init(start, 3))
        errors.append(float(info.log_ratio.abs().median()))
    assert 3.7 < errors[0] / errors[1] < 4.3
    assert 3.9 < errors[1] / errors[2] < 4.1


def test_energy_errors_of_steps_add_up_without_a_refresh():
    """To that of the trajectory: the turns between steps are divided rightly among them."""
    start = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    unadjusted = fastebm.MCLMC(double_well, 0.2, 1e30)
    state, infos = unadjusted.init(start, 3), []
    for _ in range(5):
        state, info = unadjusted.step(state)
        infos.append(info.energy_error)
    adjusted = fastebm.AdjustedMCLMC(double_well, 0.2, 4)
    _, whole = adjusted.step(adjusted.init(start, 3))
    assert bool((infos[0] == 0).all())
    # One momentum, drawn at one key; the other has noise of 1e-16.
    torch.testing.assert_close(torch.stack(infos[1:]).sum(0), -whole.log_ratio, rtol=1e-9, atol=1e-11)


# Warm-up ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("first", [2.0, 1e-3, 1e3])
def test_warm_up_meets_its_target(first, pooled):
    """From any first step: the squared energy error over the dimensions is near its target after it, and all chains
    stay finite."""
    scales = torch.linspace(0.5, 2, 30)
    sampler = fastebm.MCLMC(gaussian(scales), first)
    state = sampler.init(10 * torch.ones(1, 30), 1, num_chains=200)
    given = state.schedule.clone()
    state = sampler.warm_up(state, 400, pooled=pooled)
    assert not torch.equal(given[..., 0], state.schedule[..., 0])
    assert state.warmed_up == 400
    assert state.step == 400
    h, length, temperature = state.schedule[0].unbind(-1)
    assert bool((temperature == 1).all())
    assert bool((h == h[0]).all()) is pooled
    assert h.std() / h.mean() < 0.1
    # The root of the sum of variances is 7.3; along one chain less of it is seen.
    assert 5 < float(length.mean()) < 8.5
    errors: list[Tensor] = []
    before = state.schedule.clone()
    sampler.run(state, 200, keep=lambda k, x, info: errors.append(info.energy_error))
    found = torch.stack(errors).square().mean() / 30
    assert 0.7 < float(found) / 5e-4 < 1.4
    assert torch.equal(before, state.schedule)


def test_a_smaller_target_gives_smaller_steps_by_its_sixth_root():
    sampler = fastebm.MCLMC(normal, 1.0, 5.0)
    start = sampler.init(torch.zeros(1, 40), 1, num_chains=100)
    states = [sampler.warm_up(start, 300, target=target) for target in (5e-4, 5e-4 / 64)]
    assert all(bool((state.schedule[..., 1] == 5).all()) for state in states)
    steps = [float(state.schedule[..., 0].mean()) for state in states]
    assert 1.8 < steps[0] / steps[1] < 2.3


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("mass", ["given", "diagonal"])
def test_warm_up_of_the_adjusted_one(pooled, mass):
    sampler = fastebm.AdjustedMCLMC(gaussian(torch.linspace(0.5, 2, 30)), 0.1, 3)
    state = sampler.warm_up(sampler.init(torch.zeros(1, 30), 1, num_chains=200), 200, pooled=pooled, mass=mass)
    assert bool((state.schedule[0, :, 0] == state.schedule[0, 0, 0]).all()) is pooled
    assert state.warmed_up == 200
    rates: list[Tensor] = []
    sampler.run(state, 100, keep=lambda k, x, info: rates.append(info.accepted.double().mean()))
    assert 0.8 < float(torch.stack(rates).mean()) < 0.97


def test_masses_from_a_warm_up():
    """They are the inverse variances, which make the step size that of a Gaussian of scale 1."""
    scales = torch.logspace(-1, 1, 20)
    sampler = fastebm.MCLMC(gaussian(scales), 0.1)
    start = sampler.init(scales * torch.randn(400, 20, generator=torch.Generator().manual_seed(3)), 1)
    state = sampler.warm_up(start, 400, mass="diagonal")
    torch.testing.assert_close(state.inverse_mass[0], scales**2, rtol=0.5, atol=0)
    round_one = fastebm.MCLMC(normal, 0.1)
    expected = round_one.warm_up(round_one.init(start.x / scales, 1), 400)
    means = [s.schedule[0].mean(0) for s in (state, expected)]
    torch.testing.assert_close(*means, rtol=0.1, atol=0)
    assert float(sampler.warm_up(start, 400).schedule[0, :, 0].mean()) < 0.5 * float(means[0][0])
    masked = sampler.init(start.x, 1, mask=torch.arange(20) < 3, known=torch.zeros(20))
    held = sampler.warm_up(masked, 100, mass="diagonal")
    assert bool((held.x[:, :3] == 0).all())
    assert bool((held.inverse_mass[:, :3] == 0).all())


@pytest.mark.parametrize("make", [fastebm.MCLMC, fastebm.AdjustedMCLMC])
def test_warm_up_of_a_chain_does_not_depend_on_the_others(make):
    sampler = make(normal, 0.5)
    start = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    before = sampler.init(start, 1)
    whole = sampler.warm_up(before, 60)
    assert torch.equal(before.x, start)
    parts = [sampler.warm_up(before.rows(a, b), 60) for a, b in ((0, 1), (1, 5), (5, 7))]
    assert torch.equal(torch.cat([p.x for p in parts]), whole.x)
    assert torch.equal(torch.cat([p.schedule for p in parts], 1), whole.schedule)
    on = sampler.advance(whole, 5)
    assert torch.equal(on.x, torch.cat([sampler.advance(p, 5).x for p in parts]))
    assert torch.equal(type(on).from_state_dict(on.state_dict()).schedule, whole.schedule)
    pooled = [sampler.warm_up(state, 60, pooled=True) for state in (before, before.rows(0, 3))]
    assert not torch.equal(pooled[0].schedule[:, :1], pooled[1].schedule[:, :1])


# Bits ---------------------------------------------------------------------------------------------------------------


def chains_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    return SAMPLERS[name](double_well), torch.randn(6, 5, generator=torch.Generator().manual_seed(2)).to(dtype)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_can_be_split_anyhow(name, dtype):
    sampler, start = chains_of(name, dtype)
    whole = sampler.sample(start, 7, seed=4, chain_ids=10)
    assert torch.equal(sampler.sample(start, 7, seed=4, chain_ids=10, batch_size=4), whole)
    parts = [sampler.sample(start[a:b], 7, seed=4, chain_ids=10 + a) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert torch.equal(torch.cat(parts), whole)
    ids = torch.arange(10, 16).flip(0)
    assert torch.equal(sampler.sample(start.flip(0), 7, seed=4, chain_ids=ids).flip(0), whole)
    assert not torch.equal(sampler.sample(start, 7, seed=5, chain_ids=10), whole)


@both
def test_threads_do_not_matter(name):
    sampler = SAMPLERS[name](double_well)
    start = torch.randn(60, 3000, generator=torch.Generator().manual_seed(2)) / 10
    expected = sampler.sample(start, 4, seed=4)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(sampler.sample(start, 4, seed=4), expected)
    finally:
        torch.set_num_threads(before)


@both
def test_a_chain_resumes(name, tmp_path):
    """Through step, advance, a saved state and rows of it: the bits are those of one run."""
    sampler, start = chains_of(name)
    whole = sampler.sample(start, 9, seed=4)
    state = sampler.init(start, 4)
    for _ in range(2):
        state, info = sampler.step(state)
        assert torch.equal(info.after, state.x)
    state = sampler.advance(state, 3)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    kind = MicrocanonicalState if name == "MCLMC" else AdjustedState
    loaded = kind.from_state_dict(torch.load(tmp_path / "state.pt"))
    first = sampler.advance(loaded.rows(0, 2), 4)
    rest = sampler.advance(loaded.rows(2, 6), 4)
    assert torch.equal(torch.cat((first.x, rest.x)), whole)
    one = sampler.advance(loaded, 4)
    for field in ("work", "pending", "momentum", "energy"):
        if hasattr(one, field):
            assert torch.equal(torch.cat((getattr(first, field), getattr(rest, field))), getattr(one, field))


@both
def test_step_leaves_its_state_as_it_was(name):
    sampler, start = chains_of(name)
    state, _ = sampler.step(sampler.init(start, 4))
    kept = {n: v.clone() for n, v in state.state_dict().items() if isinstance(v, Tensor)}
    after, info = sampler.step(state)
    assert all(torch.equal(getattr(state, n), v) for n, v in kept.items())
    assert torch.equal(info.before, state.x)
    torch.testing.assert_close(info.energy.float(), double_well(state.x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(info.gradient, 4 * state.x * (state.x**2 - 1), rtol=1e-5, atol=1e-5)
    again, _ = sampler.step(state)
    assert torch.equal(again.x, after.x)


@both
def test_kept_states(name):
    sampler, start = chains_of(name)
    frames = sampler.sample(start, 6, seed=4, keep="trajectory", thin=2, batch_size=4)
    assert frames.shape == (4, 6, 5)
    assert torch.equal(frames[0], start)
    for k in (1, 2, 3):
        assert torch.equal(frames[k], sampler.sample(start, 2 * k, seed=4))
    assert torch.equal(sampler.sample(start, 0, seed=4), start)
    assert sampler.sample(start[:0], 3, seed=4).shape == (0, 5)


@both
def test_images_masks_and_conditions(name):
    """Known entries stay, and the others are those of a chain in fewer dimensions; a row of conditions goes along."""

    def energy(x: Tensor, center: Tensor) -> Tensor:
        return 0.5 * (x - center[:, None, None, None]).square().flatten(1).sum(1)

    sampler = SAMPLERS[name](energy)
    start = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    mask, centers = torch.rand(3, 3, generator=torch.Generator().manual_seed(1)) < 0.4, torch.tensor([0.0, 1, 2, 30])
    options = {"mask": mask, "known": torch.full((3, 3), 0.5).expand(2, 3, 3), "conditions": [centers]}
    x = sampler.sample(start, 30, seed=4, **options)
    assert bool((x[:, :, mask] == 0.5).all())
    assert torch.equal(sampler.sample(start, 30, seed=4, batch_size=3, **options), x)
    assert bool((x[3, :, ~mask].mean() - x[0, :, ~mask].mean()).abs() > 3)
    state = sampler.init(start, 4, **options)
    assert torch.equal(type(state).from_state_dict(state.state_dict()).inverse_mass, state.inverse_mass)
    laid = start.contiguous(memory_format=torch.channels_last)
    assert torch.equal(sampler.sample(laid, 30, seed=4, **options), x)
    none = options | {"conditions": [centers[:0]]}
    assert sampler.sample(start[:0], 3, seed=4, **none).shape == start[:0].shape


@pytest.mark.parametrize("mass", [4.0, torch.tensor([4.0, 0.25, 1.0]), torch.tensor([[4.0], [0.25]])])
def test_mass_is_a_change_of_variables(mass):
    """x sqrt(m) moves as x does without masses; powers of two make that exact up to rounding."""
    scale = torch.as_tensor(mass).sqrt()
    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(2)).double()
    for make in (lambda e, **o: fastebm.MCLMC(e, 0.2, 2.0, **o), lambda e, **o: fastebm.AdjustedMCLMC(e, 0.3, 2, **o)):
        with_mass = make(lambda x: double_well(x * scale), mass=mass).sample(start / scale, 6, seed=4)
        torch.testing.assert_close(with_mass * scale, make(double_well).sample(start, 6, seed=4), rtol=1e-9, atol=1e-9)


def test_schedules_and_steps_for_each_chain():
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    each = torch.tensor([0.1, 0.3, 0.5])
    whole = fastebm.MCLMC(double_well, each, 2.0).sample(start, 8, seed=4)
    for i in range(3):
        alone = fastebm.MCLMC(double_well, float(each[i]), 2.0).sample(start[i : i + 1], 8, seed=4, chain_ids=i)
        assert torch.equal(alone[0], whole[i])
    falling = fastebm.MCLMC(double_well, fastebm.schedules.linear(0.5, 0.1), 2.0)
    x = falling.sample(start, 8, seed=4)
    assert torch.equal(falling.sample(start, 8, seed=4, batch_size=2), x)
    # One step of a schedule is that of its row, with the turn that ends the step before of its own size.
    state = falling.init(start, 4, num_steps=5)
    for _ in range(7):
        state, _ = falling.step(state)
    moved = falling.advance(falling.init(start, 4, num_steps=5), 7)
    assert torch.equal(moved.x, state.x)
    steps = [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1]
    state = falling.init(start.double(), 4, num_steps=5)
    for k, h in enumerate(steps):
        before = state
        state, _ = falling.step(state)
        assert bool(((state.x - before.x).norm(dim=1) <= h * (1 + 1e-6)).all())
        if k:
            assert bool(((state.x - before.x).norm(dim=1) > 0.5 * h).all())


def test_a_score_alone():
    """Samples without energies; what needs them says so."""
    sampler = fastebm.MCLMC(fastebm.score_gradient(lambda x: -x), 1.0, 3.0)
    plain = fastebm.MCLMC(normal, 1.0, 3.0, engine="autograd")
    start = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    x = sampler.sample(start, 30, seed=1)
    torch.testing.assert_close(x, plain.sample(start, 30, seed=1), rtol=1e-3, atol=1e-3)
    state, _ = sampler.step(sampler.init(start, 1))
    assert bool(sampler.step(state)[1].energy_error.isnan().all())
    with pytest.raises(TypeError, match="warm_up needs energies"):
        sampler.warm_up(state, 20)
    with pytest.raises(TypeError, match="AdjustedMCLMC needs energies"):
        fastebm.AdjustedMCLMC(fastebm.score_gradient(lambda x: -x), 1.0)


def test_lost_chains_are_named():
    def broken(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 50, torch.nan, normal(x))

    start = torch.zeros(3, 4)
    start[1, 0] = 60
    for name in SAMPLERS:
        with pytest.raises(FloatingPointError, match="chain 8"):
            SAMPLERS[name](broken).sample(start, 3, seed=1, chain_ids=7)
        x = SAMPLERS[name](broken).sample(start, 3, seed=1, chain_ids=7, check=False)
        assert bool(x[[0, 2]].isfinite().all())


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fastebm.MCLMC(normal, 0.0), ValueError, r"step_size must be finite and .*positive"),
        (lambda: fastebm.MCLMC(normal, -1.0), ValueError, r"step_size must be finite and .*positive"),
        (lambda: fastebm.MCLMC(normal, math.nan), ValueError, "finite"),
        (
            lambda: fastebm.MCLMC(normal, torch.tensor([0.1, -0.1])),
            ValueError,
            r"step_size must be finite and .*positive",
        ),
        (lambda: fastebm.MCLMC(normal, 0.1, 0.0), ValueError, r"decoherence_length must be finite and .*positive"),
        (lambda: fastebm.MCLMC(normal, 0.1, -2), ValueError, r"decoherence_length must be finite and .*positive"),
        (lambda: fastebm.MCLMC(normal, 0.1, temperature=0), ValueError, r"temperature must be finite and .*positive"),
        (lambda: fastebm.MCLMC(normal, 0.1, mass=0.0), ValueError, "mass must be finite and positive"),
        (lambda: fastebm.MCLMC(normal, 0.1, mass=torch.tensor([1.0, 0.0])), ValueError, "mass must be finite"),
        (lambda: fastebm.MCLMC(normal, 0.1, mass=torch.tensor([1])), TypeError, "mass must be of floating"),
        (lambda: fastebm.MCLMC(normal, 0.1, mass="heavy"), TypeError, "mass"),
        (lambda: fastebm.MCLMC("energy", 0.1), TypeError, "energy"),
        (lambda: fastebm.MCLMC(normal, "fast"), TypeError, "schedule"),
        (lambda: fastebm.AdjustedMCLMC(normal, 0.0), ValueError, r"step_size must be finite and .*positive"),
        (lambda: fastebm.AdjustedMCLMC(normal, 0.1, 0), ValueError, "trajectory_steps"),
        (lambda: fastebm.AdjustedMCLMC(normal, 0.1, 1.5), TypeError, "trajectory_steps"),
        (lambda: fastebm.AdjustedMCLMC(normal, 0.1, jitter=1.0), ValueError, r"jitter must be in \[0, 1\)"),
        (lambda: fastebm.AdjustedMCLMC(normal, 0.1, jitter=-0.1), ValueError, r"jitter must be in \[0, 1\)"),
    ],
)
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


X = torch.zeros(3, 4)


@pytest.mark.parametrize("name", ["MCLMC", "adjusted"])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(3, 1), 5), {}, ValueError, "at least 2 dimensions that are not masked"),
        ((torch.zeros(3), 5), {}, ValueError, "at least 2 dimensions that are not masked"),
        ((X, -1), {}, ValueError, "num_steps"),
        ((X, 1.5), {}, TypeError, "num_steps"),
        ((X.half(), 5), {}, TypeError, "float32 or float64"),
        ((X, 5), {"start_step": 2**32 - 2}, ValueError, "leave the range"),
        ((X, 5), {"chain_ids": torch.arange(2)}, ValueError, "chain_ids"),
        ((X, 5), {"num_chains": 4}, ValueError, "num_chains is 4"),
        ((X, 5), {"thin": 0}, ValueError, "thin"),
        ((X, 5), {"keep": "first"}, ValueError, "keep is"),
        ((X, 5), {"batch_size": 0}, ValueError, "batch_size"),
        ((X, 5), {"mask": torch.ones(4)}, ValueError, "mask and known come together"),
        ((X, 5), {"mask": torch.ones(5), "known": X}, ValueError, "mask must broadcast"),
        (
            (X, 5),
            {"mask": torch.tensor([1, 1, 1, 0]), "known": X},
            ValueError,
            "at least 2 dimensions that are not masked",
        ),
        ((X, 5), {"conditions": [torch.zeros(2)]}, ValueError, "condition"),
    ],
)
def test_bad_arguments(name, arguments, options, error, message):
    with pytest.raises(error, match=message):
        SAMPLERS[name](normal).sample(*arguments, seed=0, **options)


@pytest.mark.parametrize("make", [fastebm.MCLMC, fastebm.AdjustedMCLMC])
def test_more_bad_arguments(make):
    with pytest.raises(ValueError, match="a value for each of 2 chains was given, but there are 3"):
        make(normal, torch.tensor([0.1, 0.2])).sample(X, 5, seed=0)
    falling = make(normal, fastebm.schedules.linear(0.2, 0.1))
    with pytest.raises(ValueError, match="give num_steps"):
        falling.init(X)
    with pytest.raises(ValueError, match="but this one has a schedule"):
        falling.warm_up(falling.init(X, num_steps=5), 20)
    with pytest.raises(ValueError, match="mass must be a number, broadcast to one sample"):
        make(normal, 0.1, mass=torch.ones(5)).sample(X, 5, seed=0)
    sampler = make(normal, 0.1)
    name = "target" if make is fastebm.MCLMC else "target_acceptance"
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{name} must be"):
            sampler.warm_up(sampler.init(X), 20, **{name: target})
    with pytest.raises(ValueError, match="num_steps"):
        sampler.warm_up(sampler.init(X), 5)
    with pytest.raises(ValueError, match='mass is "given" or "diagonal"'):
        sampler.warm_up(sampler.init(X), 20, mass="dense")


@both
def test_diagnostics(name):
    """The chains are the same, and the summary knows their temperature and acceptance."""
    sampler, start = chains_of(name)
    x, summary = sampler.sample(start, 40, seed=1, diagnostics=True)
    assert torch.equal(x, sampler.sample(start, 40, seed=1))
    assert (summary.acceptance is not None) == (name != "MCLMC")
    assert "nan" not in str(summary)


def test_a_warm_up_needs_chains():
    sampler = fastebm.MCLMC(normal, 0.1)
    with pytest.raises(ValueError, match="a warm-up needs at least one chain"):
        sampler.warm_up(sampler.init(X[:0]), 20, pooled=True)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_warm_up_on_a_plain_keeps_its_numbers_in_range(pooled):
    """Where no step has an error, step sizes became infinite, and states with them."""
    sampler = fastebm.MCLMC(lambda x: 0 * x.sum(1), 0.5)
    warm = sampler.warm_up(sampler.init(X[:, :3], seed=0), 400, pooled=pooled)
    assert bool(warm.schedule.isfinite().all())
    assert bool(warm.x.isfinite().all())


# The warm-up of an ensemble -------------------------------------------------------------------------------------------

SCALES = torch.tensor([0.05, 0.3, 1.0, 3.0, 20.0]).repeat(4)
CENTER = torch.linspace(-5, 5, 20)
BANANA = (1.0, 0.3)


def skewed(x):
    return 0.5 * ((x - CENTER) / SCALES).square().sum(1)


def banana(x):
    """x_0 is normal, x_1 normal around its square: E x_1 = 1, Var x_1 = 2 + 0.09."""
    return 0.5 * x[:, 0].square() + 0.5 * ((x[:, 1] - x[:, 0].square()) / BANANA[1]).square()


STARTS = {
    "spread wide": 30 * torch.randn(300, 20, generator=torch.Generator().manual_seed(0)),
    "from one place": torch.full((300, 20), 10.0),
}


@pytest.mark.parametrize("start", STARTS)
def test_an_ensemble_learns_the_scales_of_a_gaussian(start):
    """With variances 160,000 times each other. Gradients tell the scales of a Gaussian wherever its chains are."""
    sampler = fastebm.AdjustedMCLMC(skewed, 0.3, 8, jitter=0.2)
    warm = sampler.warm_up_ensemble(sampler.init(STARTS[start], seed=1), 300, 50)
    assert warm.warmed_up == warm.step == 350
    assert torch.allclose(warm.inverse_mass[0], SCALES.square(), rtol=1e-3)
    assert len(warm.schedule[0, :, 0].unique()) == 1
    rates = []
    x = sampler.run(warm, 40, keep=lambda k, x, info: rates.append(info.acceptance_probability.mean()))
    assert abs(float(torch.stack(rates).mean()) - 0.9) < 0.03
    z = (x - CENTER) / SCALES
    assert float(z.mean(0).abs().max()) < 4 / 300**0.5
    assert float((z.var(0) - 1).abs().max()) < 4 * (2 / 300) ** 0.5
    assert torch.equal(sampler.advance(warm, 2).schedule, warm.schedule)


def test_an_ensemble_samples_the_banana():
    sampler = fastebm.AdjustedMCLMC(banana, 0.3, 8, jitter=0.2)
    start = 3 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    warm = sampler.warm_up_ensemble(sampler.init(start, seed=1), 200, 50)
    x = sampler.run(warm, 150).double()
    first = torch.stack((x[:, 0], x[:, 1], x[:, 0].square(), (x[:, 1] - x[:, 0].square()).square()))
    expected = torch.tensor([0.0, 1.0, 1.0, BANANA[1] ** 2], dtype=torch.float64)
    errors = torch.tensor([1.0, 2 + BANANA[1] ** 2, 2.0, 2 * BANANA[1] ** 4], dtype=torch.float64).div(2000).sqrt()
    assert bool(((first.mean(1) - expected).abs() < 4 * errors).all()), (first.mean(1) - expected) / errors


def test_an_ensemble_has_the_bits_of_any_number_of_threads_and_goes_on_in_any_batch(tmp_path):
    sampler, start = fastebm.AdjustedMCLMC(banana, 0.3, 3, jitter=0.2), torch.randn(9, 2)
    warm = sampler.warm_up_ensemble(sampler.init(start, seed=3), 30, 20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = sampler.warm_up_ensemble(sampler.init(start, seed=3), 30, 20)
    finally:
        torch.set_num_threads(threads)
    for name in ("x", "schedule", "inverse_mass", "key"):
        assert torch.equal(getattr(warm, name), getattr(again, name))
    torch.save(warm.state_dict(), tmp_path / "warm.pt")
    loaded = sampler.load_state(torch.load(tmp_path / "warm.pt"))
    assert loaded.warmed_up == 50
    whole = sampler.advance(warm, 7).x
    assert torch.equal(sampler.advance(loaded, 7).x, whole)
    assert torch.equal(sampler.advance(warm.rows(2, 5), 7).x, whole[2:5])
    assert torch.equal(sampler.run(warm.rows(0, 9), 7, batch_size=4), whole)


def test_an_ensemble_leaves_what_is_known_and_comes_back_from_steps_that_fail():
    mask, heat = torch.arange(20) % 5 == 1, 2.0
    sampler = fastebm.AdjustedMCLMC(skewed, 300.0, 8, temperature=heat, jitter=0.2)
    start = CENTER + torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    state = sampler.init(start, seed=1, mask=mask, known=torch.tensor(0.5).expand(20))
    warm = sampler.warm_up_ensemble(state, 200, 50)
    assert bool((warm.inverse_mass[:, mask] == 0).all())
    x = sampler.run(warm, 40)
    assert bool((x[:, mask] == 0.5).all())
    ratio = ((x - CENTER) / SCALES).var(0)[~mask] / heat
    assert float((ratio - 1).abs().max()) < 4 * (2 / 300) ** 0.5


@pytest.mark.parametrize(
    ("chains", "given", "words"),
    [
        (3, (19, 20), "num_unadjusted must be at least 20"),
        (3, (20, 19), "num_steps must be at least 20"),
        (1, (20, 20), "it needs two or more, got 1"),
        (0, (20, 20), "needs at least one chain"),
    ],
)
def test_ensembles_that_cannot_be_warmed_up_are_refused(chains, given, words):
    sampler = fastebm.AdjustedMCLMC(banana, 0.3, 3)
    with pytest.raises(ValueError, match=words):
        sampler.warm_up_ensemble(sampler.init(torch.zeros(chains, 2), seed=0), *given)
    if chains == 3:
        with pytest.raises(TypeError, match="AdjustedMCLMC goes on from a AdjustedState"):
            sampler.warm_up_ensemble(fastebm.MCLMC(banana, 0.3).init(torch.zeros(3, 2)), 20, 20)


@pytest.mark.parametrize("name", ["MCLMC", "adjusted"])
def test_states_are_checked(name):
    sampler, start = chains_of(name)
    state, _ = sampler.step(sampler.init(start, 4))
    saved = state.state_dict()
    load = type(state).from_state_dict
    assert torch.equal(load(saved).x, state.x)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"schedule": saved["schedule"].double()}, "schedule"),
        ({"schedule": saved["schedule"][..., :1]}, "schedule"),
        ({"schedule": -saved["schedule"]}, "schedule has positive numbers"),
        ({"inverse_mass": torch.ones(1, 4)}, "inverse_mass must be"),
        ({"inverse_mass": torch.ones(5)}, "inverse_mass must be"),
        ({"warmed_up": -1}, "warmed_up"),
        ({"warmed_up": "many"}, "warmed_up"),
        ({"step": 7}, "stands at step"),
        ({"colour": 1}, "unknown"),
    ]
    if name == "MCLMC":
        changes += [
            ({"momentum": torch.zeros(6, 4)}, "momentum must be"),
            ({"work": torch.zeros(6, 2)}, "work must be"),
            ({"pending": torch.zeros(6, 3).double()}, "pending must be"),
            ({"momentum": None}, "go together"),
        ]
    else:
        changes += [({"energy": torch.zeros(5)}, "energy must have shape")]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            load({**saved, **change})
    with pytest.raises(ValueError, match="no momentum yet" if name == "MCLMC" else "no energy and gradient yet"):
        _ = sampler.init(start, 4).kept


@both
def test_the_name_says_what_it_does(name):
    shown = repr(SAMPLERS[name](double_well, mass=torch.ones(5)))
    assert "step_size=0." in shown
    assert "mass=(5,)" in shown
    assert "double_well" in shown


def test_a_state_with_other_weights():
    """Energy and gradient of a state belong to the weights that were read; without them they are found anew."""
    sampler, start = chains_of("adjusted")
    state, _ = sampler.step(sampler.init(start, 4))
    anew = replace(state, energy=None, gradient=None)
    assert torch.equal(sampler.step(anew)[0].x, sampler.step(state)[0].x)
