"""Diagnostics: bits that don't depend on batches, states that load, options and shapes that are refused, verdicts."""

import doctest
import importlib
import itertools
import math
import sys
import types
from typing import Any

import pytest
import torch

import fastebm
from fastebm.sampling.diagnostics import (
    BatchedDiagnostics,
    Diagnostics,
    DiagnosticsObserver,
    LevelDiagnostics,
    SwapCounter,
    run_observed,
)
from fastebm.sampling.diagnostics.accumulators import MAX_BLOCKS, Blocks, ordered_dot
from fastebm.sampling.observers import trajectory_recorder

CHAINS = 7


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def updates(num_updates: int, chains: int = CHAINS, shape: tuple[int, ...] = (3, 5)) -> list[dict[str, torch.Tensor]]:
    """What a sampler may report of updates, all of it."""
    x = normal(num_updates + 1, chains, *shape)
    return [
        {
            "x": x[k + 1],
            "before": x[k],
            "energy": x[k].square().flatten(1).sum(1),
            "gradient": 2 * x[k],
            "accepted": x[k].flatten(1)[:, 0] > 0,
            "energy_error": x[k].flatten(1)[:, 1] * 1000,
        }
        for k in range(num_updates)
    ]


def fed(all_updates: list[dict[str, torch.Tensor]], rows: slice = slice(None), **options: Any) -> Diagnostics:
    diagnostics = Diagnostics(**options)
    for one in all_updates:
        diagnostics.update(**{name: value[rows] for name, value in one.items()})
    return diagnostics


def tensors(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state or summary, by their place."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, dict):
        items = value.items()
    elif hasattr(value, "__dataclass_fields__"):
        items = vars(value).items()
    else:
        return {}
    return {place: found for name, part in items for place, found in tensors(part, f"{path}.{name}").items()}


def assert_same_bits(one: Any, other: Any) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert first
    for place, value in first.items():
        assert value.dtype == second[place].dtype
        assert torch.equal(value.nan_to_num(nan=7.25), second[place].nan_to_num(nan=7.25)), place


# The same bits by any route -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(0, 3, 7), (0, 1, 2, 3, 4, 5, 6, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("shape", [(), (2,), (3, 5), (2, 33, 32)], ids=str)
def test_batches_change_no_bit(cuts: tuple[int, ...], shape: tuple[int, ...]) -> None:
    observed = updates(40, shape=(*shape, 2))
    options: dict[str, Any] = {
        "lags": 5,
        "keep_scalars": True,
        "summaries": {"first": lambda x: x.flatten(1)[:, 0]},
    }
    whole = fed(observed, **options)
    parts = [fed(observed, slice(a, b), **options) for a, b in itertools.pairwise(cuts)]
    joined = Diagnostics.concatenate(parts)
    assert_same_bits(whole.state_dict(), joined.state_dict())
    assert_same_bits(whole.summary(), joined.summary())
    # what is said of a chain is what it says of itself alone
    alone = fed(observed, slice(2, 3), **options).summary()
    together = whole.summary()
    assert torch.equal(alone.chain_mean, together.chain_mean[2:3])
    assert torch.equal(alone.chain_variance, together.chain_variance[2:3])
    assert torch.equal(alone.chain_ess, together.chain_ess[2:3])


def test_threads_change_no_bit() -> None:
    observed = updates(12, chains=600, shape=(40, 30))
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(fed(observed, lags=3).summary())
    torch.set_num_threads(threads)
    assert_same_bits(*found)


@pytest.mark.parametrize("split", [0, 1, 20, 33])
def test_a_saved_state_goes_on_bit_for_bit(split: int, tmp_path: Any) -> None:
    observed, options = updates(50), {"lags": 4, "keep_scalars": True}
    first = fed(observed[:split], **options)
    first.swaps.update(torch.tensor([True, False]), torch.tensor([True, True]))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = Diagnostics(**options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in observed[split:]:
        resumed.update(**one)
        first.update(**one)
    assert_same_bits(first.state_dict(), resumed.state_dict())
    assert_same_bits(first.summary(), resumed.summary())
    assert_same_bits(fed(observed, **options).summary().chain_ess, first.summary().chain_ess)


def test_a_loaded_state_is_a_copy() -> None:
    observed = updates(6)
    first = fed(observed[:3])
    second = Diagnostics()
    second.load_state_dict(first.state_dict())
    before = {place: value.clone() for place, value in tensors(first.state_dict()).items()}
    second.update(**observed[3])
    assert_same_bits(before, tensors(first.state_dict()))


def test_integers_and_views_of_any_layout_are_read_alike() -> None:
    x = normal(4, 3, 8, 8)
    plain, other = Diagnostics(), Diagnostics()
    for k in range(5):
        plain.update(x + k)
        other.update((x + k).to(memory_format=torch.channels_last))
    assert_same_bits(plain.summary(), other.summary())


# What is accumulated --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_moments_are_those_of_the_kept_trajectory(dtype: torch.dtype) -> None:
    observed = updates(45)
    diagnostics = Diagnostics(lags=7)
    for one in observed:
        diagnostics.update(one["x"].to(dtype), one["energy"], accepted=one["accepted"])
    x = torch.stack([one["x"].to(dtype) for one in observed]).double()
    summary = diagnostics.summary()
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(summary.element_mean, x.mean((0, 1)), **close)
    torch.testing.assert_close(summary.element_variance, x.flatten(0, 1).var(0), **close)
    scalars = torch.stack([x.mean((2, 3)), x.flatten(2).norm(dim=2)], 2)
    torch.testing.assert_close(summary.chain_mean[:, 1:3], scalars.mean(0), **close)
    torch.testing.assert_close(summary.chain_variance[:, 1:3], scalars.var(0), **close)
    torch.testing.assert_close(summary.mean[1:3], scalars.mean((0, 1)), **close)
    torch.testing.assert_close(summary.std[1:3], scalars.flatten(0, 1).std(0), **close)
    assert summary.names[:3] == ("energy", "mean", "norm")
    accepted = torch.stack([one["accepted"] for one in observed]).double()
    torch.testing.assert_close(summary.acceptance, accepted.mean(0))


def test_energies_far_from_zero_cost_no_digits() -> None:
    """A float32 accumulator, or sums of squares about 0, would lose all digits of a variance of 1 at a mean of 1e7."""
    energies = 1e7 + normal(200, 3).double()
    diagnostics = Diagnostics(lags=5)
    for energy in energies:
        diagnostics.update(torch.zeros(3, 1), energy)
    summary = diagnostics.summary()
    torch.testing.assert_close(summary.chain_variance[:, 0], energies.var(0), rtol=1e-7, atol=0)
    shifted = Diagnostics(lags=5)
    for energy in energies:
        shifted.update(torch.zeros(3, 1), energy - 1e7)
    torch.testing.assert_close(summary.chain_ess[:, 0], shifted.summary().chain_ess[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("elements", [1, 2, 3, 1000, 1024, 1025, 3072, 5000])
def test_sums_are_in_the_order_of_the_operators(elements: int) -> None:
    values = normal(3, elements).double()
    lanes = torch.zeros(3, 1024, dtype=torch.float64)
    for e in range(elements):
        lanes[:, e % 1024] += values[:, e] * values[:, e]
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    assert torch.equal(ordered_dot(values, values), lanes[:, 0])


@pytest.mark.parametrize("num_updates", [1, 2, 3, 31, 32, 33, 64, 100, 1000])
def test_blocks_hold_all_values_and_halves_nearly_all(num_updates: int) -> None:
    values = normal(num_updates, 2, 3).double()
    blocks = Blocks.like(values[0])
    for value in values:
        blocks.add(value)
    whole = blocks.whole()
    assert blocks.count == whole.count == num_updates
    torch.testing.assert_close(whole.mean, values.mean(0))
    if num_updates > 1:
        torch.testing.assert_close(whole.variance, values.var(0))
    assert blocks.full < MAX_BLOCKS
    halves = blocks.halves()
    if num_updates < 2:
        assert halves is None
        return
    assert halves is not None
    first, second = halves
    half = int(first.count)
    assert second.count == half
    assert num_updates // 2 >= half >= 7 / 16 * (num_updates - 1)
    if num_updates < MAX_BLOCKS:
        assert half == num_updates // 2
    end = blocks.full * blocks.length
    torch.testing.assert_close(first.mean, values[:half].mean(0))
    torch.testing.assert_close(second.mean, values[end - half : end].mean(0))
    if half > 1:
        torch.testing.assert_close(second.variance, values[end - half : end].var(0))


def test_what_is_reported_of_updates() -> None:
    observed = updates(30)
    summary = fed(observed).summary()
    stacked = {name: torch.stack([one[name] for one in observed]).double() for name in observed[0]}
    moved = (stacked["x"] - stacked["before"]).flatten(2).norm(dim=2)
    assert summary.displacement is not None
    torch.testing.assert_close(summary.displacement.mean, moved.mean(0))
    assert summary.gradient_norm is not None
    norms = stacked["gradient"].flatten(2).norm(dim=2)
    torch.testing.assert_close(summary.gradient_norm.mean, norms.mean(0))
    torch.testing.assert_close(summary.gradient_norm.variance, norms.var(0))
    assert summary.energy_error is not None
    torch.testing.assert_close(summary.energy_error.mean, stacked["energy_error"].mean(0))
    assert torch.equal(summary.divergences, (stacked["energy_error"] > 1000).sum(0))
    assert int(summary.divergences.sum()) > 0
    x, g = (stacked[name].flatten(0, 1).flatten(1) for name in ("before", "gradient"))
    covariance = ((x - x.mean(0)) * (g - g.mean(0))).sum() / (len(x) - 1) / x.shape[1]
    assert summary.temperature == pytest.approx(float(covariance), rel=1e-12)


def test_an_energy_error_that_is_no_number_is_a_divergence() -> None:
    diagnostics = Diagnostics()
    for error in (math.nan, math.inf, -math.inf, 0.0):
        diagnostics.update(torch.zeros(1, 1), energy_error=torch.tensor([error]))
    divergences = diagnostics.summary().divergences
    assert divergences is not None
    assert divergences.tolist() == [2]  # to lose energy without end is no divergence


def test_projections_are_fixed_directions_of_norm_1() -> None:
    basis = torch.eye(6).reshape(6, 2, 3)
    found = []
    for batch in (basis, basis.flip(0)):
        diagnostics = Diagnostics(projections=4, seed=5)
        diagnostics.update(batch)
        found.append(diagnostics.summary().chain_mean[:, 2:])
    assert torch.equal(found[0], found[1].flip(0))
    torch.testing.assert_close(found[0].square().sum(0), torch.ones(4, dtype=torch.float64))
    other = Diagnostics(projections=4, seed=6)
    other.update(basis)
    assert not torch.allclose(other.summary().chain_mean[:, 2:], found[0], atol=0.1)
    assert not torch.allclose(found[0][:, 0], found[0][:, 1], atol=0.1)
    none = Diagnostics(projections=0)
    none.update(basis)
    assert none.names == ("mean", "norm")


def test_swaps_are_counted_for_each_pair() -> None:
    swaps = SwapCounter()
    assert swaps.summary() is None
    even, odd = torch.tensor([True, False, True]), torch.tensor([False, True, False])
    swaps.update(even, torch.tensor([[True, True, False], [True, False, True]]))
    swaps.update(odd, torch.tensor([[True, False, True]]))
    summary = swaps.summary()
    assert summary is not None
    assert (summary.attempted.tolist(), summary.accepted.tolist()) == ([2, 1, 2], [2, 0, 1])
    assert summary.acceptance.tolist() == [1.0, 0.0, 0.5]
    counts = SwapCounter()
    counts.update(torch.tensor([[1, 1, 1], [1, 0, 1]]), torch.tensor([[1, 0, 1], [1, 0, 0]]))
    totals = counts.summary()
    assert totals is not None
    assert (totals.attempted.tolist(), totals.accepted.tolist()) == ([2, 1, 2], [2, 0, 1])
    with pytest.raises(TypeError, match="attempted must be a bool or int64 tensor"):
        swaps.update(torch.ones(3), even)
    with pytest.raises(ValueError, match="of as many pairs, got 3 and 2"):
        swaps.update(even, even[:2])
    with pytest.raises(ValueError, match="earlier rounds had 3 pairs of rungs, this one has 2"):
        swaps.update(even[:2], even[:2])
    both = SwapCounter.concatenate([swaps, SwapCounter(), swaps]).summary()
    assert both is not None
    assert both.attempted.tolist() == [4, 2, 4]
    again = SwapCounter.from_state_dict(swaps.state_dict()).summary()
    assert again is not None
    assert torch.equal(again.accepted, summary.accepted)


# With samplers --------------------------------------------------------------------------------------------------------


def bowl(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x.square().sum(1)


def test_an_observer_reads_every_kth_state_and_batches_change_nothing() -> None:
    sampler = fastebm.Langevin(bowl, 0.1, 0.3)
    x0 = normal(6, 2)

    def run(cuts: list[tuple[int, int]], every: int, warmup: int) -> Diagnostics:
        together = BatchedDiagnostics(Diagnostics(every=every, warmup=warmup, keep_scalars=True), 41)
        state = sampler.init(x0, seed=1)
        for first, last in cuts:
            sampler.advance_(state.rows(first, last), 41, [together.observer(first, last)])
            state = sampler.init(x0, seed=1)
        return together.result()

    whole = run([(0, 6)], every=4, warmup=5)
    assert whole.num_updates == 9
    assert_same_bits(whole.state_dict(), run([(0, 1), (1, 6)], every=4, warmup=5).state_dict())
    frames = sampler.sample(x0, 41, seed=1, keep="trajectory")
    scalars = whole.summary().scalars
    assert scalars is not None
    torch.testing.assert_close(scalars[:, :, 1], frames[9::4].double().mean(2))
    torch.testing.assert_close(scalars[:, :, 0], bowl(frames[8:-1:4].flatten(0, 1)).reshape(9, 6).double())


@pytest.mark.parametrize(("every", "warmup"), [(1, 0), (4, 0), (5, 3), (3, 7)])
def test_the_next_state_that_is_read_is_known(every: int, warmup: int) -> None:
    observer = DiagnosticsObserver(Diagnostics(), every, warmup)
    read, done = [], 0
    while done < 30:
        done += observer.updates_until_read(done)
        read.append(done)
    assert read[:-1] == [k for k in range(1, read[-1]) if observer.reads(k)]
    assert read[0] == warmup + every


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize(("every", "warmup"), [(1, 0), (7, 0), (5, 12), (50, 1), (60, 0)])
def test_observed_chains_are_the_same_chains(every: int, warmup: int, engine: str) -> None:
    """Blocks between the states that are read change no bit, and everything is reported of those."""
    torch.manual_seed(0)
    energy = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    sampler = fastebm.Langevin(energy, 0.1, fastebm.schedules.linear(0.3, 0.1), engine=engine)
    x0, options = normal(5, 3), {"seed": 4, "num_steps": 51}
    frames = torch.empty(51, 5, 3)
    observer = DiagnosticsObserver(Diagnostics(keep_scalars=True, lags=4), every, warmup)
    recorder = trajectory_recorder(frames, 1)
    end = run_observed(
        sampler, sampler.init(x0, **options), 51, observer, [lambda done, x, energies: recorder(done - 1, x, energies)]
    )
    expected = sampler.sample(x0, 51, seed=4, keep="trajectory")
    assert torch.equal(end.x, expected[-1])
    assert torch.equal(frames, expected[1:])
    assert (end.step, end.key.tolist()) == (51, [4, 51, 51])
    by_callback = DiagnosticsObserver(Diagnostics(keep_scalars=True, lags=4), every, warmup)
    sampler.sample(x0, 51, seed=4, keep=by_callback.callback)
    seen = len(range(warmup + every, 52, every))
    assert observer.diagnostics.num_updates == by_callback.diagnostics.num_updates == seen
    if seen:
        assert_same_bits(observer.diagnostics.summary(), by_callback.diagnostics.summary())


def test_blocks_between_reads_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    energy = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    sampler, blocks = fastebm.Langevin(energy, 0.1, 0.1), []
    advance = fastebm.Langevin._advance_blocks_

    def counted(self: Any, update: Any, state: Any, num_steps: int, *rest: Any) -> int:
        done = advance(self, update, state, num_steps, *rest)
        blocks.append(done)
        return done

    monkeypatch.setattr(fastebm.Langevin, "_advance_blocks_", counted)
    run_observed(sampler, sampler.init(normal(5, 3), seed=1), 60, DiagnosticsObserver(Diagnostics(), every=20))
    assert sum(blocks) >= 3 * 17  # of 19 updates before each of three that are read, all but those that run alone


def test_a_callback_is_called_beside() -> None:
    sampler = fastebm.Langevin(bowl, 0.1, 0.3)
    seen, plain = [], []
    observer = DiagnosticsObserver(Diagnostics(), every=6, warmup=1)

    def keep(k: int, x: torch.Tensor, info: Any) -> None:
        seen.append((k, x.clone(), info.energy))

    run_observed(sampler, sampler.init(normal(4, 2), seed=1), 20, observer, callback=keep, thin=4)
    sampler.sample(normal(4, 2), 20, seed=1, thin=4, keep=lambda k, x, info: plain.append((k, x, info.energy)))
    assert [k for k, _, _ in seen] == [4, 8, 12, 16, 20]
    for (_, x, energy), (_, other, other_energy) in zip(seen, plain, strict=True):
        assert torch.equal(x, other)
        assert torch.equal(energy, other_energy)
    assert observer.diagnostics.num_updates == 3


def test_a_score_has_no_energy_to_be_judged() -> None:
    together = BatchedDiagnostics(True, 60, energies=False)
    observer = together.observer()
    for k, x in enumerate(normal(60, 5, 2)):
        observer(k + 1, x, torch.zeros(5))
    assert together.result().names[0] == "mean"
    assert "The energy was not given" in "\n".join(together.summary().verdict())


def test_steps_with_a_metropolis_test_report_it() -> None:
    diagnostics = Diagnostics()
    for k, x in enumerate(normal(5, 2, 3)):
        ratio = torch.tensor([-0.5, -math.inf if k == 2 else math.nan if k == 3 else 0.0], dtype=torch.float64)
        info = types.SimpleNamespace(energy=x.sum(1), gradient=x, before=x, accepted=ratio > -0.1, log_ratio=ratio)
        diagnostics.update_from(x, info)
    summary = diagnostics.summary()
    assert summary.acceptance is not None
    assert summary.energy_error is not None
    assert summary.divergences is not None
    assert summary.acceptance.tolist() == pytest.approx([0.0, 0.6])
    assert float(summary.energy_error.mean[0]) == 0.5
    assert summary.divergences.tolist() == [0, 2]


def test_a_second_batch_does_not_pass_for_later_updates_of_the_first() -> None:
    sampler, x0 = fastebm.Langevin(bowl, 0.1, 0.3), normal(6, 2)
    diagnostics = Diagnostics()
    with pytest.raises(ValueError, match=r"^update 1 was reported after update 10: chains that run in batches need"):
        sampler.sample(x0, 10, seed=1, batch_size=3, keep=diagnostics.callback)
    observer = DiagnosticsObserver(Diagnostics())
    with pytest.raises(ValueError, match="update 1 was reported after update 10"):
        sampler.sample(x0, 10, seed=1, batch_size=3, keep=observer.callback)
    state = sampler.init(x0, seed=1)
    observer = DiagnosticsObserver(Diagnostics(), every=2)
    sampler.advance_(state.rows(0, 3), 9, [observer])
    with pytest.raises(ValueError, match="update 1 was reported after update 9"):
        sampler.advance_(state.rows(3, 6), 9, [observer])
    # but the same chains may go on in another call
    whole, halves = Diagnostics(), Diagnostics()
    end = sampler.sample(x0, 10, seed=1, keep=whole.callback)
    middle = sampler.sample(x0, 6, seed=1, keep=halves.callback)
    assert torch.equal(sampler.sample(middle, 4, seed=1, start_step=6, keep=halves.callback), end)
    assert_same_bits(whole.summary(), halves.summary())


def test_a_long_chain_is_read_at_some_500_places() -> None:
    for num_steps, expected in ((1, 1), (15, 1), (1023, 1), (1024, 2), (100_000, 195)):
        assert BatchedDiagnostics(True, num_steps).every == expected
        assert num_steps // expected >= min(num_steps, 512)


class Growing(torch.nn.Module):
    def forward(self, x: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
        return (0.1 + 0.4 * beta) * x.square().sum((1, 2, 3))


def test_levels_of_a_cascade() -> None:
    def energy(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x.square().sum((1, 2, 3))

    cascade = fastebm.Cascade({4: energy, 8: energy}, num_steps=12, step_size=0.1)
    found = []
    for batch_size in (None, 3):
        levels = LevelDiagnostics(Diagnostics(keep_scalars=True), {8: (0.5, 0.0)})
        options: dict[str, Any] = {"on_level_start": levels.start, "keep": levels.callback, "batch_size": batch_size}
        cascade.sample(8, seed=1, channels=1, **options)
        found.append(levels.summaries())
    calls: list[int] = []
    images, told = cascade.sample(
        8,
        seed=1,
        channels=1,
        batch_size=5,
        diagnostics=Diagnostics(keep_scalars=True),
        thin=5,
        keep=lambda k, x, info: calls.append(k),
    )
    assert torch.equal(images, cascade.sample(8, seed=1, channels=1))
    assert calls == [5, 10, 15, 20] * 2
    for size, (start, end) in cascade.level_temperatures().items():
        assert_same_bits(told[size], found[0][size])
        assert told[size].implied_temperature == (start, end)
    assert cascade.level_temperatures()[8][1] == 0.0
    assert list(found[0]) == [4, 8]
    for size in (4, 8):
        assert_same_bits(found[0][size], found[1][size])
        assert found[0][size].num_updates == 12
        assert found[0][size].num_chains == 8
    assert found[0][8].element_mean.shape == (1, 8, 8)
    growing = fastebm.ExpandingCascade(Growing(), size=8, beta=0.999, num_steps=6, step_size=0.1)
    assert growing.levels[0].num_steps == 0
    _, told = growing.sample(3, seed=1, channels=1, diagnostics=True)
    assert list(told) == [8]
    cascade = fastebm.Cascade({4: energy, 8: fastebm.score_gradient(lambda x: -x)}, num_steps=12, step_size=0.1)
    _, told = cascade.sample(3, seed=1, channels=1, diagnostics=True)
    assert [told[size].names[0] for size in (4, 8)] == ["energy", "mean"]
    with pytest.raises(ValueError, match="would see none of 12 updates"):
        cascade.sample(3, seed=1, channels=1, diagnostics=Diagnostics(every=20), on_level_start=pytest.fail)
    assert found[0][8].implied_temperature == (0.5, 0.0)
    said = " ".join(found[0][8].verdict())
    assert "a temperature that goes from 0.5 to 0 along the chain" in said
    assert "R-hat is" not in said
    assert "R-hat is" in " ".join(found[0][4].verdict())


def test_the_temperature_of_samples_is_that_of_the_discretised_chain() -> None:
    """Unadjusted Langevin on N(0, I) has the variance 1 / (1 - step_size / 2), and Cov(x, grad E) is that variance."""
    for step_size in (0.1, 0.6):
        sampler = fastebm.Langevin(bowl, step_size, math.sqrt(2 * step_size))
        start = sampler.sample(torch.zeros(1, 2), 100, seed=2, num_chains=2000)
        diagnostics = Diagnostics(temperature=1.0)
        sampler.sample(start, 300, seed=2, start_step=100, keep=diagnostics.callback)
        summary = diagnostics.summary()
        assert summary.temperature == pytest.approx(1 / (1 - step_size / 2), rel=0.02)
        assert any("have the temperature" in line for line in summary.verdict()) == (step_size == 0.6)


def test_a_temperature_is_constant_to_the_rounding_of_its_schedules() -> None:
    assert "goes from" not in verdict_of(normal(60, 4, 2), temperature=(0.1, 0.1 * (1 + 1e-7)))
    assert "goes from 0.1 to 0.101" in verdict_of(normal(60, 4, 2), temperature=(0.1, 0.101))
    assert "goes from 0.1 to 0 " in verdict_of(normal(60, 4, 2), temperature=(0.1, 0.0))


# The verdict ----------------------------------------------------------------------------------------------------------


def verdict_of(trajectory: torch.Tensor, **options: Any) -> str:
    """Of states (n, B, ...), whose mean is the energy."""
    diagnostics = Diagnostics(**options)
    for x in trajectory:
        diagnostics.update(x, x.flatten(1).mean(1))
    return "\n".join(diagnostics.summary().verdict())


def test_independent_draws_are_good() -> None:
    said = verdict_of(normal(200, 8, 4))
    assert said.startswith("Nothing speaks against these chains: R-hat is at most 1.0")
    assert said.endswith("No number from these chains shows a mode that none of them visited.")


def test_chains_in_two_modes_disagree() -> None:
    away = torch.where(torch.arange(8) < 3, 5.0, -5.0)[:, None]
    said = verdict_of(normal(200, 8, 1) + away)
    assert "R-hat is above 1.1 for energy" in said
    assert "the chains disagree" in said
    assert "fewer than 400 independent draws for energy" in said
    assert "Nothing speaks" not in said


def test_chains_on_their_way_drift() -> None:
    said = verdict_of(normal(200, 20, 1) - torch.linspace(0, 3, 200)[:, None, None])
    assert "a drift of energy (-1" in said
    assert "the chains are still on their way" in said


def test_starts_that_are_remembered_show_in_nested_rhat() -> None:
    groups = torch.arange(40) // 10
    same = verdict_of(normal(60, 40, 1), superchains=groups)
    assert "Nested" not in same
    apart = verdict_of(normal(60, 40, 1) + groups[:, None], superchains=groups)
    assert "Nested R-hat is above 1.058, the bound for superchains of 10" in apart
    assert "R-hat is above 1.1 for energy" in apart
    slow = normal(60, 40, 1).cumsum(0)  # each chain wanders, and forgets that all began at 0
    assert "R-hat is above 1.1 for energy" in verdict_of(slow)
    assert "R-hat is above" not in verdict_of(slow, superchains=groups)
    assert "needs two superchains" in verdict_of(normal(60, 40, 1), superchains=torch.zeros(40, dtype=torch.int64))


def test_what_cannot_be_judged_is_said() -> None:
    said = verdict_of(normal(3, 1, 2))
    assert "3 updates are too few for R-hat" in said
    assert "One chain can't tell" in said
    assert "Nothing speaks" not in said
    assert "of 20 updates are rough" in verdict_of(normal(20, 5, 2))
    diagnostics = Diagnostics()
    for x in normal(60, 5, 2):
        diagnostics.update(x)
    assert "The energy was not given" in "\n".join(diagnostics.summary().verdict())


def test_chains_that_stand_still_or_are_lost() -> None:
    assert "No chain ever changed energy, mean, norm," in verdict_of(torch.ones(60, 4, 2))
    lost = normal(60, 4, 2)
    lost[30:, 2, 0] = math.nan
    said = verdict_of(lost)
    assert said.startswith("1 of 4 chains are not finite; the first is in row 2.")
    assert said.count("\n") == 0


def test_proposals_energy_errors_and_swaps_have_their_sentences() -> None:
    diagnostics = Diagnostics()
    for k, x in enumerate(normal(100, 10, 2)):
        accepted = torch.full((10,), k % 10 == 0)
        accepted[3] = False
        errors = torch.zeros(10)
        errors[:2] = 2000.0 if k == 50 else 0.0
        diagnostics.update(x, accepted=accepted, energy_error=errors)
        diagnostics.swaps.update(torch.tensor([True, True]), torch.tensor([k % 2 == 0, k % 50 == 0]))
    summary = diagnostics.summary()
    said = "\n".join(summary.verdict())
    assert "1 of 10 chains never accepted a proposal" in said
    assert "Only 9.0% of the proposals were accepted: the steps are too large." in said
    assert "2 of 10 chains had energy errors above 1000" in said
    assert "between the rungs 1 and 2 (2.0%)" in said
    table = str(summary).splitlines()
    assert table[0] == "10 chains, 100 updates"
    assert table[1].split() == ["mean", "std", "error", "of", "mean", "R-hat", "ESS"]
    assert [line.split()[0] for line in table[2:4]] == ["mean", "norm"]
    assert "acceptance 9.0%, of single chains 0.0% to 10.0%" in table
    assert table[-1] == "exchanges 50.0%, 2.0%"
    always = Diagnostics()
    for x in normal(100, 4, 2):
        always.update(x, accepted=torch.ones(4, dtype=torch.bool))
    assert "100.0% of the proposals were accepted: larger steps" in "\n".join(always.summary().verdict())


# ArviZ ----------------------------------------------------------------------------------------------------------------


def test_arviz_gets_the_kept_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins for both forms of the library, as neither is needed by fastebm."""
    observed = updates(6)
    summary = fed(observed, keep_scalars=True).summary()
    assert summary.scalars is not None
    new, old = types.ModuleType("arviz_base"), types.ModuleType("arviz")
    new.from_dict = lambda groups: ("tree", groups["posterior"])  # type: ignore[attr-defined]
    old.from_dict = lambda posterior: ("data", posterior)  # type: ignore[attr-defined]
    for modules, kind in (({"arviz_base": new, "arviz": old}, "tree"), ({"arviz_base": None, "arviz": old}, "data")):
        with monkeypatch.context() as patch:
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
            given, posterior = summary.to_arviz()
        assert given == kind
        assert list(posterior) == list(summary.names)
        assert posterior["energy"].shape == (CHAINS, 6)
        assert torch.equal(torch.from_numpy(posterior["norm"]).T, summary.scalars[:, :, 2])
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ModuleNotFoundError, match=r"^to_arviz needs ArviZ: pip install arviz-base$"):
        summary.to_arviz()
    with pytest.raises(ValueError, match="were not kept: Diagnostics\\(keep_scalars=True\\) does"):
        fed(observed).summary().to_arviz()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lags": 0}, ValueError, "lags must be at least 1, got 0"),
        ({"projections": -1}, ValueError, "projections must not be negative"),
        ({"projections": 1.5}, TypeError, "projections must be an integer"),
        ({"seed": 2**70}, ValueError, "seed must be in"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"warmup": -1}, ValueError, "warmup must not be negative"),
        ({"summaries": [len]}, TypeError, "summaries must be a mapping"),
        ({"summaries": {"a": 1}}, TypeError, "must map names to functions"),
        ({"summaries": {"norm": len}}, ValueError, "norm is there already"),
        ({"superchains": torch.zeros(3)}, TypeError, "superchains must be an int64 tensor"),
        ({"temperature": -1}, ValueError, "temperature must be finite and not negative"),
        ({"temperature": (1, 2, 3)}, ValueError, "temperature must be a number, or those"),
        ({"temperature": "hot"}, TypeError, "temperature must be a real number"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Diagnostics(**options)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor of floating point numbers, got \\[1.0\\]"),
        ({"x": torch.zeros(3, dtype=torch.int64)}, TypeError, "x must be a tensor of floating"),
        ({"x": torch.zeros(3, 0)}, ValueError, "with an element at least for each chain, got \\(3, 0\\)"),
        ({"x": torch.zeros(())}, ValueError, "x must be \\(B, ...\\)"),
        ({"energy": torch.zeros(4)}, ValueError, "energy must be \\(3,\\) on cpu, got a tensor \\(4,\\)"),
        ({"energy": 1.0}, TypeError, "energy must be a tensor of real numbers, got 1.0"),
        ({"gradient": torch.zeros(3)}, ValueError, "gradient must be \\(3, 2\\)"),
        ({"accepted": torch.zeros(3)}, TypeError, "accepted must be a tensor of bool"),
        ({"energy_error": torch.zeros(3, 1)}, ValueError, "energy_error must be \\(3,\\)"),
        ({"before": torch.zeros(2, 2)}, ValueError, "before must be \\(3, 2\\)"),
    ],
    ids=str,
)
def test_updates_that_do_not_fit_are_refused(given: Any, error: type[Exception], message: str) -> None:
    diagnostics = Diagnostics()
    with pytest.raises(error, match=message):
        diagnostics.update(**({"x": torch.zeros(3, 2)} | given))
    assert diagnostics.num_updates == 0


def test_later_updates_must_be_like_the_first() -> None:
    diagnostics = Diagnostics(superchains=torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="superchains has 3 entries, but there are 4 chains"):
        diagnostics.update(torch.zeros(4, 2))
    diagnostics.update(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="earlier updates were given energy, this one x alone"):
        diagnostics.update(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"x must be \(3, 2\) as in earlier updates, got \(3, 3\)"):
        diagnostics.update(torch.zeros(3, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="superchains must be of equal size for nested R-hat, got 1 to 2 chains"):
        diagnostics.summary()


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (torch.zeros(3, 1), ValueError, "'mine' must give one number for each of 3 states"),
        (1.0, TypeError, "'mine' must give a tensor of real numbers, got 1.0"),
    ],
    ids=str,
)
def test_summaries_of_a_wrong_form_are_refused(result: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Diagnostics(summaries={"mine": lambda x: result}).update(torch.zeros(3, 2))


def test_nothing_to_sum_up() -> None:
    with pytest.raises(ValueError, match="no update was observed yet"):
        Diagnostics().summary()
    empty = Diagnostics()
    empty.update(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="there are no chains"):
        empty.summary()
    with pytest.raises(ValueError, match="needs at least one part"):
        Diagnostics.concatenate([])
    with pytest.raises(ValueError, match="diagnostics of batches must be alike"):
        Diagnostics.concatenate([fed(updates(3)), fed(updates(4))])
    with pytest.raises(ValueError, match="diagnostics of batches must be alike"):
        Diagnostics.concatenate([fed(updates(3)), fed(updates(3), lags=2)])
    with pytest.raises(ValueError, match="would see none of 10 updates: warmup=10, every=1"):
        BatchedDiagnostics(Diagnostics(warmup=10), 10)
    with pytest.raises(TypeError, match="diagnostics must be True, False or Diagnostics, got 3"):
        BatchedDiagnostics(3, 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"on_level_start=levels\.start"):
        LevelDiagnostics().callback(1, torch.zeros(1, 1, 4, 4), None)


def test_more_memory_than_there_is_is_refused_before_it_is_taken() -> None:
    with pytest.raises(ValueError, match=r"the diagnostics of 1,000 chains would need .* of memory"):
        Diagnostics(lags=10**12).update(torch.zeros(1000, 2))


def broken(state: dict[str, Any], change: str) -> Any:
    kept = state["kept"]
    changes: dict[str, Any] = {
        "a list": lambda: [state],
        "a field less": lambda: {name: value for name, value in state.items() if name != "shape"},
        "other names": lambda: state | {"names": ["energy"]},
        "other lags": lambda: state | {"lags": 7},
        "another shape": lambda: state | {"shape": [8, 3, 5]},
        "an unknown part": lambda: state | {"kept": kept | {"more": kept["blocks"]}},
        "a part less": lambda: state | {"kept": {name: part for name, part in kept.items() if name != "lags"}},
        "a field of a part less": lambda: state | {"kept": kept | {"blocks": {"length": 1}}},
        "text for a tensor": lambda: state | {"kept": kept | {"blocks": kept["blocks"] | {"means": "x"}}},
        "a tensor too short": lambda: (
            state | {"kept": kept | {"blocks": kept["blocks"] | {"means": kept["blocks"]["means"][:5]}}}
        ),
        "no names": lambda: state | {"given": 5},
        "text for a shape": lambda: state | {"shape": "x"},
        "numbers for parts": lambda: state | {"kept": 3},
        "text for a trace": lambda: state | {"trace": "x"},
        "a trace that is not kept": lambda: state | {"trace": torch.zeros(9, 7, 6)},
        "floats of another kind": lambda: (
            state | {"kept": kept | {"blocks": kept["blocks"] | {"means": kept["blocks"]["means"].float()}}}
        ),
        "elements less": lambda: state | {"kept": {name: part for name, part in kept.items() if name != "elements"}},
        "counts that disagree": lambda: state | {"kept": kept | {"lags": kept["lags"] | {"count": 99}}},
        "swaps of floats": lambda: state | {"swaps": {"attempted": torch.zeros(2), "accepted": torch.zeros(2)}},
    }
    return changes[change]()


@pytest.mark.parametrize(
    "change",
    [
        *("a list", "a field less", "other names", "other lags", "another shape", "an unknown part", "a part less"),
        *("a field of a part less", "text for a tensor", "a tensor too short", "counts that disagree"),
        *("swaps of floats", "no names", "text for a shape", "numbers for parts", "text for a trace"),
        *("a trace that is not kept", "floats of another kind", "elements less"),
    ],
)
def test_states_of_others_are_refused(change: str) -> None:
    diagnostics = fed(updates(5))
    before = diagnostics.summary()
    with pytest.raises(ValueError, match=r"not the state of|is of diagnostics|has the scalar summaries of 9 of 9"):
        diagnostics.load_state_dict(broken(fed(updates(9)).state_dict(), change))
    assert_same_bits(before, diagnostics.summary())


@pytest.mark.parametrize(("saved", "loaded"), [("moments", False), ("keep_scalars", True)])
def test_a_state_of_other_options_is_refused(saved: str, loaded: bool) -> None:
    """Else later updates would count for some numbers and not for others."""
    state = fed(updates(5), **{saved: not loaded}).state_dict()
    with pytest.raises(ValueError, match=r"these keep|these diagnostics keep"):
        Diagnostics(**{saved: loaded}).load_state_dict(state)


@pytest.mark.parametrize("module", ["streaming", "swaps", "observer"])
def test_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"fastebm.sampling.diagnostics.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
