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
