"""States of all samplers: saved and loaded by one rule, and refused by samplers whose states they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastebm


def bowl(x, center):
    return 0.5 * (x - center).square().sum(1)


SAMPLERS: dict[str, Any] = {
    "Langevin": lambda: fastebm.Langevin(bowl, 0.1, 0.2),
    "MALA": lambda: fastebm.MALA(bowl, 0.3),
    "Underdamped": lambda: fastebm.Underdamped(bowl, 0.3, 1.0, mass=2.0),
    "HMC": lambda: fastebm.HMC(bowl, 0.3, 3, jitter=0.2),
    "GHMC": lambda: fastebm.GHMC(bowl, 0.3),
    "MALT": lambda: fastebm.MALT(bowl, 0.3, 3),
    "MCLMC": lambda: fastebm.MCLMC(bowl, 0.5),
    "AdjustedMCLMC": lambda: fastebm.AdjustedMCLMC(bowl, 0.5, 2),
}
CENTER = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_saved_state_goes_on_with_the_same_bits_in_another_sampler(name, tmp_path):
    sampler = SAMPLERS[name]()
    state = sampler.init(torch.zeros(5, 3), seed=1, conditions=[CENTER])
    if name not in ("Langevin", "Underdamped"):
        state = sampler.warm_up(state, 30)
    state = sampler.advance(state, 4)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    wanted = sampler.advance(state, 6)
    another = SAMPLERS[name]()
    loaded = another.load_state(torch.load(tmp_path / "state.pt"))
    assert type(loaded) is another.state_type is type(state)
    assert torch.equal(another.advance(loaded, 6).x, wanted.x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_no_state_of_a_sampler_is_told(name):
    sampler = SAMPLERS[name]()
    other = SAMPLERS["MALA" if name == "Langevin" else "Langevin"]()
    for given in (torch.zeros(5, 3), other.init(torch.zeros(5, 3), conditions=[CENTER])):
        for use in (sampler.step, lambda s: sampler.advance(s, 3), lambda s: sampler.run(s, 3)):
            with pytest.raises(TypeError, match=f"{name} goes on from a {sampler.state_type.__name__}, as its init"):
                use(given)
    with pytest.raises(ValueError, match="not the state of a chain"):
        sampler.load_state({"x": torch.zeros(5, 3)})


KINETIC = ("Underdamped", "HMC", "GHMC", "MALT")


@pytest.mark.parametrize("other", KINETIC)
@pytest.mark.parametrize("name", KINETIC)
def test_the_state_of_another_sampler_of_its_class_is_refused_in_one_line(name, other):
    """They share a class, and ran each other's states, whose rows mean other things, in silence."""
    sampler, state = SAMPLERS[name](), SAMPLERS[other]().init(torch.zeros(5, 3), seed=1, conditions=[CENTER])
    observer = fastebm.diagnostics.DiagnosticsObserver(fastebm.diagnostics.Diagnostics(), 3)
    uses = [
        lambda: sampler.step(state),
        lambda: sampler.advance(state, 3),
        lambda: sampler.warm_up(state, 30),
        lambda: sampler.run(state.rows(0, 5), 3),
        lambda: fastebm.diagnostics.run_observed(sampler, state.rows(0, 5), 3, observer),
    ]
    for use in uses if name != other else []:
        with pytest.raises(TypeError, match=rf"^{name} goes on from its own states, got one of {other}$"):
            use()
    if name == other:
        assert sampler.load_state(state.state_dict()).sampler == name
        return
    with pytest.raises(ValueError, match=rf"^not the state of a chain of {name}: it is one of {other}$"):
        sampler.load_state(state.state_dict())


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_state_names_its_sampler_and_one_without_a_name_is_taken(name):
    """States that were saved before they had names load, and from then on are those of the sampler that took them."""
    sampler = SAMPLERS[name]()
    state = sampler.init(torch.zeros(5, 3), seed=1, conditions=[CENTER])
    assert state.sampler == state.rows(1, 3).sampler == sampler.advance(state, 2).sampler == name
    saved = state.state_dict()
    assert saved.pop("sampler") == name
    assert sampler.load_state(saved).sampler == name
    assert torch.equal(sampler.advance(sampler.load_state(saved), 3).x, sampler.advance(state, 3).x)
    with pytest.raises(ValueError, match="its sampler is a name, got 3"):
        sampler.load_state({**saved, "sampler": 3})


def test_replicas_of_another_kernel_are_refused():
    def tempered(make):
        return fastebm.ParallelTempering(bowl, (1.0, 2.0), make)

    hmc = tempered(lambda e, t: fastebm.HMC(e, 0.3, 3, temperature=t))
    malt = tempered(lambda e, t: fastebm.MALT(e, 0.3, 3, temperature=t))
    state = hmc.advance(hmc.init(torch.zeros(5, 3), seed=1, conditions=[CENTER]), 3)
    assert torch.equal(hmc.advance(hmc.load_state(state.state_dict()), 3).x, hmc.advance(state, 3).x)
    for use in (lambda: malt.advance(state, 3), lambda: malt.run(state, 3)):
        with pytest.raises(TypeError, match=r"^MALT goes on from its own states, got one of HMC$"):
            use()
    with pytest.raises(ValueError, match=r"^not the state of a chain of MALT: it is one of HMC$"):
        malt.load_state(state.state_dict())
    old = {n: v for n, v in state.state_dict().items() if n != "replicas.sampler"}
    assert malt.load_state(old).replicas.sampler == "MALT"
