"""`diagnostics=True` of every sampler: the same bits, and a summary of all chains."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

import fastebm
from tests.sampling.targets import double_well, draw_double_well

SAMPLERS = {
    "Langevin": lambda **o: fastebm.Langevin(double_well, 0.02, 0.2, **o),
    "MALA": lambda **o: fastebm.MALA(double_well, 0.15, **o),
    "HMC": lambda **o: fastebm.HMC(double_well, 0.4, 3, **o),
    "GHMC": lambda **o: fastebm.GHMC(double_well, 0.4, **o),
    "MALT": lambda **o: fastebm.MALT(double_well, 0.4, 3, **o),
    "Underdamped": lambda **o: fastebm.Underdamped(double_well, 0.2, 1.0, **o),
}
every = pytest.mark.parametrize("name", SAMPLERS)


@every
@pytest.mark.parametrize("keep", ["last", "trajectory", "callback"])
def test_the_same_chains_and_a_summary(name, keep):
    sampler, start = SAMPLERS[name](), draw_double_well(24, 3)
    seen = []
    given = {"keep": (lambda k, x, info: seen.append(k)) if keep == "callback" else keep, "thin": 4}
    plain = sampler.sample(start, 12, seed=1, **given)
    calls, seen[:] = list(seen), []
    x, summary = sampler.sample(start, 12, seed=1, batch_size=10, diagnostics=True, **given)
    assert torch.equal(x, plain)
    assert summary.num_updates == 12
    assert summary.num_chains == 24
    assert seen == ([4, 8, 12] * 3 if keep == "callback" else [])
    assert calls == ([4, 8, 12] if keep == "callback" else [])
    assert str(summary)


@pytest.mark.parametrize("name", ["MALA", "HMC", "GHMC", "MALT"])
def test_the_summary_has_the_acceptance(name):
    sampler, start = SAMPLERS[name](), draw_double_well(100, 3)
    rates = []
    sampler.sample(start, 20, seed=1, keep=lambda k, x, info: rates.append(info.accepted.double().mean()))
    _, summary = sampler.sample(start, 20, seed=1, diagnostics=True)
    assert abs(float(summary.acceptance.mean()) - float(torch.stack(rates).mean())) < 1e-9


@pytest.mark.parametrize("watched", [False, True], ids=["plain", "diagnostics"])
@pytest.mark.parametrize("thin", [1, 3])
@every
def test_a_callback_may_keep_what_it_is_given(name, thin, watched):
    kept = []

    def callback(k, x, info):
        now = [x, *(getattr(info, field.name) for field in fields(info))]
        kept.append((now, [each.clone() for each in now]))

    watch = fastebm.diagnostics.Diagnostics(every=4) if watched else False
    SAMPLERS[name]().sample(
        draw_double_well(9, 3), 12, seed=1, keep=callback, thin=thin, batch_size=5, diagnostics=watch
    )
    assert len(kept) > 1
    for now, then in kept:
        assert all(torch.equal(each, earlier) for each, earlier in zip(now, then, strict=True))


def test_options_are_those_of_the_diagnostics():
    watch = fastebm.diagnostics.Diagnostics(every=5, warmup=10)
    _, summary = SAMPLERS["MALA"]().sample(draw_double_well(8, 3), 40, seed=1, diagnostics=watch)
    assert summary.num_updates == 6
    with pytest.raises(TypeError, match="diagnostics must be"):
        SAMPLERS["MALA"]().sample(draw_double_well(8, 3), 40, seed=1, diagnostics=3)


@every
def test_blocks_between_the_steps_that_are_read_change_nothing(name):
    sampler, start = SAMPLERS[name](), draw_double_well(7, 3)
    watch = fastebm.diagnostics.Diagnostics(every=4, lags=5, keep_scalars=True)
    plain = sampler.sample(start, 50, seed=1)
    found = []
    for batch_size in (None, 3):
        x, summary = sampler.sample(start, 50, seed=1, diagnostics=watch, batch_size=batch_size)
        assert torch.equal(x, plain)
        assert (summary.num_chains, summary.num_updates) == (7, 12)
        assert summary.implied_temperature == pytest.approx((1.0, 1.0))
        assert summary.gradient_norm is not None
        found.append(summary)
    for field in ("rhat", "ess", "chain_mean", "element_variance", "scalars"):
        assert torch.equal(getattr(found[0], field).nan_to_num(), getattr(found[1], field).nan_to_num()), field
    assert watch.num_updates == 0  # options of the caller, who may use them again


@pytest.mark.parametrize("kernel", ["MALA", "Langevin"])
@pytest.mark.parametrize("keep", ["last", "trajectory"])
def test_tempering_tells_of_its_swaps(kernel, keep):
    def made(energy, temperatures):
        if kernel == "MALA":
            return fastebm.MALA(energy, 0.3 * temperatures, temperature=temperatures)
        return fastebm.Langevin(energy, 0.02 * temperatures, (0.04 * temperatures**2).sqrt())

    sampler, start = fastebm.ParallelTempering(double_well, [1.0, 1.5, 3.0], made, swap_every=3), draw_double_well(5, 2)
    plain = sampler.sample(start, 100, seed=1, keep=keep, thin=10)
    watch = fastebm.diagnostics.Diagnostics(every=7)
    x, summary = sampler.sample(start, 100, seed=1, keep=keep, thin=10, diagnostics=watch)
    assert torch.equal(x, plain)
    assert (summary.num_chains, summary.num_updates) == (5, 14)
    assert ("energy" in summary.names) == (kernel == "MALA")
    assert summary.implied_temperature == (1.0, 1.0)
    state = sampler.advance(sampler.init(start, seed=1), 100)
    assert torch.equal(summary.swaps.acceptance, state.swap_rates)
    assert int(summary.swaps.attempted.sum()) == 5 * 33


def test_a_score_and_chains_of_their_own_temperature():
    sampler = fastebm.Langevin(fastebm.score_gradient(lambda x: -x), 0.1, 0.4)
    _, summary = sampler.sample(draw_double_well(5, 2), 60, seed=1, diagnostics=True)
    assert summary.names[0] == "mean"
    own = fastebm.Langevin(double_well, 0.02, torch.linspace(0.1, 0.2, 5))
    _, summary = own.sample(draw_double_well(5, 2), 60, seed=1, diagnostics=True)
    assert summary.implied_temperature is None


def test_no_step_is_no_diagnosis():
    with pytest.raises(ValueError, match="diagnostics would see none of 0 updates"):
        SAMPLERS["Langevin"]().sample(draw_double_well(5, 2), 0, diagnostics=True)
