"""Parallel tempering: both modes are found, swaps are right, and a chain has the same bits however it is cut."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

import fastebm
from fastebm.sampling import TemperedState
from tests.sampling.targets import Gaussian, kolmogorov_smirnov

KERNELS = {
    "MALA": lambda energy, t: fastebm.MALA(energy, 0.02 * t, temperature=t),
    "HMC": lambda energy, t: fastebm.HMC(energy, 0.15 * t.sqrt(), 3, temperature=t),
    "GHMC": lambda energy, t: fastebm.GHMC(energy, 0.15 * t.sqrt(), temperature=t),
    "Underdamped": lambda energy, t: fastebm.Underdamped(energy, 0.04, 1.0, temperature=t),
    "Langevin": lambda energy, t: fastebm.Langevin(energy, 0.002 * t**0, (0.004 * t).sqrt()),
}
LADDER = (1.0, 2.5, 6.0, 15.0)
every = pytest.mark.parametrize("name", KERNELS)


def deep_wells(x):
    """Two wells with a barrier of 8 between them."""
    return 8 * (x.square() - 1).square().sum(1)


@every
def test_it_finds_both_modes_where_plain_chains_do_not(name):
    start = torch.ones(300, 1)
    tempered = fastebm.ParallelTempering(deep_wells, LADDER, KERNELS[name], swap_every=2)
    steps = 400 if name in ("MALA", "HMC", "GHMC") else 1500
    share = float((tempered.sample(start, steps, seed=1) < 0).float().mean())
    assert abs(share - 0.5) < 5 * 0.5 / 300**0.5
    plain = KERNELS[name](fastebm.energy_gradient(deep_wells), torch.ones(300))
    assert float((plain.sample(start, steps, seed=1) < 0).float().mean()) < 0.1


@pytest.mark.parametrize("name", ["MALA", "HMC", "GHMC"])
def test_every_temperature_keeps_its_distribution(name):
    """Exact draws of each temperature stay such, though replicas change their temperatures."""
    target = Gaussian((1.0, 0.5))
    sampler = fastebm.ParallelTempering(target, LADDER, KERNELS[name])
    count = 4000
    state = sampler.init(torch.zeros(count, 2), seed=3)
    heat = torch.tensor(LADDER).repeat(count).sqrt()[:, None]
    state.replicas.x.copy_(target.draw(4 * count) * heat)
    state = sampler.advance(state, 20)
    assert not torch.equal(state.rung, torch.arange(4).repeat(count, 1))
    for rung, t in enumerate(LADDER):
        x = state.at(rung) / t**0.5
        assert kolmogorov_smirnov(x[:, 0], target.draw(count, seed=rung + 1)[:, 0]) > 1e-3
    assert torch.equal(state.x, state.at(0))


@every
def test_the_same_bits_however_it_is_cut(name):
    sampler = fastebm.ParallelTempering(deep_wells, LADDER, KERNELS[name], swap_every=3)
    start = torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    whole = sampler.sample(start, 12, seed=2)
    assert torch.equal(whole[2:4], sampler.sample(start[2:4], 12, seed=2, chain_ids=2))
    state = sampler.init(start, seed=2)
    for count in (1, 1, 5, 3, 2):
        state = sampler.advance(state, count)
        saved = io.BytesIO()
        torch.save(state.state_dict(), saved)
        saved.seek(0)
        state = TemperedState.from_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(whole, state.x)
    assert state.rounds == 4
    frames = sampler.sample(start, 12, seed=2, keep="trajectory", thin=2)
    assert frames.shape == (7, 6, 1)
    assert torch.equal(frames[-1], whole)


def test_starts_conditions_and_masks_are_those_of_the_chain():
    sampler = fastebm.ParallelTempering(lambda x, at: ((x - at) ** 2).sum(1), LADDER, KERNELS["HMC"])
    generator = torch.Generator().manual_seed(0)
    start, at = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    options = {"conditions": (at,), "mask": start > 0, "known": start}
    whole = sampler.sample(start, 6, seed=2, **options)
    assert torch.equal(whole[start > 0], start[start > 0])
    for i in range(5):
        own = {"conditions": (at[i : i + 1],), "mask": options["mask"][i : i + 1], "known": start[i : i + 1]}
        assert torch.equal(whole[i : i + 1], sampler.sample(start[i : i + 1], 6, seed=2, chain_ids=i, **own))
    repeated = sampler.sample(start[:1], 6, seed=2, num_chains=3, conditions=(at[:1],))
    assert torch.equal(repeated, sampler.sample(start[:1].expand(3, 3), 6, seed=2, conditions=(at[:1],)))
    assert not torch.equal(repeated[0], repeated[1])


def test_states_that_do_not_fit_are_refused():
    sampler = fastebm.ParallelTempering(deep_wells, LADDER, KERNELS["GHMC"])
    state = sampler.init(torch.ones(2, 1), seed=1).state_dict()
    for broken, words in (
        ({"rung": torch.zeros(2, 4, dtype=torch.int64)}, "all temperatures"),
        ({"rung": torch.zeros(2, 4)}, "must be torch.int64"),
        ({"rung": torch.arange(4).repeat(3, 1)}, "tried|accepted|round_trips"),
        ({"since": -1}, "since must not be negative"),
        ({"replicas": "Nothing"}, "no sampler state"),
        ({"replicas.x": None}, "missing"),
        ({"speed": 1}, "unknown"),
        ({"visited_top": torch.zeros(2, 4)}, "visited_top must be torch.bool"),
    ):
        with pytest.raises(ValueError, match=words):
            TemperedState.from_state_dict(state | broken)
    with pytest.raises(ValueError, match="mapping"):
        TemperedState.from_state_dict(None)


def test_swaps_are_those_of_a_plain_loop():
    sampler = fastebm.ParallelTempering(deep_wells, LADDER, KERNELS["MALA"])
    state = sampler.init(torch.randn(50, 1, generator=torch.Generator().manual_seed(0)), seed=4)
    state.replicas.x.copy_(torch.randn(200, 1, generator=torch.Generator().manual_seed(1)))
    for _ in range(3):
        energy = deep_wells(state.replicas.x.double()).view(50, 4)
        uniform = fastebm.ops.uniform(
            (50, 3), seed=4, step=int(state.replicas.key[1]), stream=14, chain_ids=torch.arange(50) * 4
        ).double()
        rung = state.rung.clone()
        for chain in range(50):
            for pair in range(state.rounds % 2, 3, 2):
                low, high = (int((rung[chain] == r).nonzero()) for r in (pair, pair + 1))
                ratio = (1 / LADDER[pair] - 1 / LADDER[pair + 1]) * (energy[chain, low] - energy[chain, high])
                if uniform[chain, pair] < torch.exp(ratio):
                    rung[chain, low], rung[chain, high] = pair + 1, pair
        state = sampler.swap(state)
        assert torch.equal(state.rung, rung)
        table = state.replicas.schedule[0, :, 0]
        assert torch.allclose(table, 0.02 * torch.tensor(LADDER)[rung.flatten()])


def test_round_trips_are_counted():
    sampler = fastebm.ParallelTempering(Gaussian((1.0,)), (1.0, 1.2), KERNELS["MALA"])
    state = sampler.advance(sampler.init(torch.zeros(20, 1), seed=1), 200)
    assert int(state.round_trips.min()) > 5
    assert float(state.swap_rates) > 0.5


def test_a_tuned_ladder_swaps_evenly():
    """Of a Gaussian in 30 dimensions the best ladder is geometric; this one begins far from it."""
    target = Gaussian((1.0,) * 30)
    ladder = (1.0, 1.1, 1.2, 1.3, 8.0)
    kernel = lambda energy, t: fastebm.MALA(energy, 0.1 * t, temperature=t)  # noqa: E731
    sampler = fastebm.ParallelTempering(target, ladder, kernel)
    tuned = sampler
    for _ in range(4):
        tuned = tuned.tuned(target.draw(100), 200, seed=1)
    assert tuned.temperatures[0] == 1
    assert tuned.temperatures[-1] == 8

    def rates(tempering):
        state = tempering.advance(tempering.init(target.draw(200), seed=2), 200)
        counts = torch.zeros_like(state.accepted)
        return tempering.advance(replace(state, accepted=counts, tried=counts.clone()), 200).swap_rates

    assert float(rates(sampler).min()) < 0.03
    assert float(rates(tuned).min()) > 0.13
    assert torch.allclose(tuned.temperatures.log().diff(), torch.full((4,), 8.0).double().log() / 4, rtol=0.15)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: fastebm.ParallelTempering(deep_wells, (1.0,), KERNELS["MALA"]),
            ValueError,
            "two temperatures or more",
        ),
        (lambda: fastebm.ParallelTempering(deep_wells, (2.0, 1.0), KERNELS["MALA"]), ValueError, "ascending"),
        (
            lambda: fastebm.ParallelTempering(deep_wells, (0.0, 1.0), KERNELS["MALA"]),
            ValueError,
            "positive and ascending",
        ),
        (
            lambda: fastebm.ParallelTempering(deep_wells, "hot", KERNELS["MALA"]),
            TypeError,
            "temperatures must be numbers",
        ),
        (lambda: fastebm.ParallelTempering(deep_wells, LADDER, 3), TypeError, "kernel must be a function"),
        (
            lambda: fastebm.ParallelTempering(deep_wells, LADDER, lambda e, t: 3),
            TypeError,
            "kernel must make a sampler",
        ),
        (
            lambda: fastebm.ParallelTempering(deep_wells, LADDER, lambda e, t: fastebm.MALA(deep_wells, 0.1)),
            ValueError,
            "on the energy that it is given",
        ),
        (
            lambda: fastebm.ParallelTempering(deep_wells, LADDER, lambda e, t: fastebm.MALA(e, 0.1)).init(
                torch.ones(2, 1)
            ),
            ValueError,
            "must depend on the temperature",
        ),
        (
            lambda: fastebm.ParallelTempering(fastebm.score_gradient(lambda x: -x), LADDER, KERNELS["Langevin"]),
            TypeError,
            "a score tells none",
        ),
        (
            lambda: fastebm.ParallelTempering(deep_wells, LADDER, KERNELS["MALA"]).init(torch.ones(2, 1), num_chains=3),
            ValueError,
            "num_chains is 3, but x0 has 2 starts",
        ),
        (
            lambda: fastebm.ParallelTempering(deep_wells, LADDER, KERNELS["MALA"]).sample(
                torch.ones(2, 1), 2, start_step=2**32 - 1
            ),
            ValueError,
            "leave the range",
        ),
        (
            lambda: fastebm.ParallelTempering(deep_wells, LADDER, KERNELS["MALA"], swap_every=0),
            ValueError,
            "swap_every must be at least 1",
        ),
    ],
)
def test_bad_options_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@every
def test_a_saved_state_goes_on_with_the_same_bits(name, tmp_path):
    sampler = fastebm.ParallelTempering(deep_wells, LADDER, KERNELS[name], swap_every=2)
    state = sampler.advance(sampler.init(torch.ones(5, 1), seed=1), 10)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    again = sampler.load_state(torch.load(tmp_path / "state.pt"))
    assert torch.equal(sampler.advance(again, 10).x, sampler.advance(state, 10).x)
    assert torch.equal(again.accepted, state.accepted)
    assert again.rounds == 5
    wanted = sampler.advance(state, 10).x
    assert torch.equal(sampler.run(again, 10), wanted)  # which overwrites it


def test_what_is_no_tempered_state_is_told():
    sampler = fastebm.ParallelTempering(deep_wells, LADDER, KERNELS["MALA"])
    saved = sampler.init(torch.ones(5, 1), seed=1).state_dict()
    wrong = {
        r"missing \['accepted'": {},
        "missing": {name: value for name, value in saved.items() if name != "replicas.key"},
        r"accepted must be torch.int64 \(5, 3\)": saved | {"accepted": torch.zeros(5, 4, dtype=torch.int64)},
        "hold all temperatures": saved | {"rung": torch.zeros(5, 4, dtype=torch.int64)},
    }
    for words, given in wrong.items():
        with pytest.raises(ValueError, match=words):
            sampler.load_state(given)
    with pytest.raises(ValueError, match="mapping"):
        sampler.load_state(torch.zeros(3))
    shorter = fastebm.ParallelTempering(deep_wells, LADDER[:3], KERNELS["MALA"])
    with pytest.raises(TypeError, match="of 3 temperatures"):
        shorter.advance(sampler.load_state(saved), 3)
    with pytest.raises(ValueError, match="only a single one can be repeated"):
        sampler.init(torch.ones(5, 1), num_chains=7)
    with pytest.raises(TypeError, match="x0 must be a tensor"):
        sampler.init(5)
