"""`diagnostics=True` of every sampler: the same bits, and a summary of all chains."""

from __future__ import annotations

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


def test_options_are_those_of_the_diagnostics():
    watch = fastebm.diagnostics.Diagnostics(every=5, warmup=10)
    _, summary = SAMPLERS["MALA"]().sample(draw_double_well(8, 3), 40, seed=1, diagnostics=watch)
    assert summary.num_updates == 6
    with pytest.raises(TypeError, match="diagnostics must be"):
        SAMPLERS["MALA"]().sample(draw_double_well(8, 3), 40, seed=1, diagnostics=3)
