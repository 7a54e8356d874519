"""Schedules against their closed forms, and the table that kernels read."""

import math

import numpy as np
import pytest
import torch

import fastebm
from fastebm.sampling import constant, cosine, from_epsilon, linear, piecewise_constant, polynomial, schedules, table

TIMES = torch.linspace(0, 1, 11, dtype=torch.float64)


@pytest.mark.parametrize(
    ("schedule", "closed_form"),
    [
        (constant(0.3), lambda t: 0.3),
        (linear(0.015, 0.0), lambda t: 0.015 * (1 - t)),
        (linear(1.0, 2.0), lambda t: 1 + t),
        (polynomial(4.0, 1.0, 2.0), lambda t: 1 + 3 * (1 - t) ** 2),
        (polynomial(0.0, 2.0, 0.5), lambda t: 2 - 2 * math.sqrt(1 - t)),
        (piecewise_constant(2.0, 0.5), lambda t: 2 if t < 0.5 else 0.5),
        (cosine(3.0, 1.0), lambda t: 2 + math.cos(math.pi * t)),
    ],
)
def test_values_follow_the_closed_form(schedule, closed_form):
    expected = torch.tensor([closed_form(t) for t in TIMES.tolist()], dtype=torch.float64)
    torch.testing.assert_close(schedule(TIMES), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("schedule", [linear(0.1, 0.7), polynomial(0.1, 0.7, 3.0), cosine(0.1, 0.7)])
def test_ends_are_met_exactly(schedule):
    values = schedules.evaluate(schedule, 7)
    assert values[0] == 0.1
    assert values[-1] == 0.7


def test_time_runs_from_the_first_to_the_last_update():
    seen = []
    schedules.evaluate(lambda t: seen.append(t) or t, 5)
    assert seen[0].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert schedules.evaluate(linear(3.0, 1.0), 1).tolist() == [3.0]  # a single update has the start value


def test_table_pairs_step_size_and_noise():
    rows = table(1, linear(0.5, 0.0), 3)
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[1, 0.5], [1, 0.25], [1, 0]]


def test_any_callable_is_a_schedule():
    assert table(lambda t: 1 + t, lambda t: t * t, 2).tolist() == [[1, 0], [2, 1]]


def test_textbook_unties_to_temperature_one():
    pair = from_epsilon(0.2)
    assert pair == {"step_size": pytest.approx(0.02), "noise_std": 0.2}
    assert pair["noise_std"] ** 2 / (2 * pair["step_size"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("step_size", "noise_std", "message"),
    [
        (0.0, 0.1, r"step_size > 0.* got 0.0 at step 0 of 4"),
        (-1.0, 0.1, "step_size > 0"),
        (1e-60, 0.1, "step_size > 0"),  # 0 in float32
        (1e60, 0.1, "step_size > 0"),  # infinite in float32
        (linear(1.0, 0.0), 0.1, "at step 3 of 4"),
        (1.0, -0.1, "noise_std >= 0"),
        (1.0, linear(0.1, -0.1), "at step 2 of 4"),
        (1.0, math.nan, "finite"),
        (math.inf, 0.0, "finite"),
        (1.0, lambda t: 1 / t - 1, "not finite at step 0 of 4"),
        (1.0, lambda t: t[:2], r"shape \(4,\), got shape \(2,\)"),
        (1.0, lambda t: 0.5, "got float"),
    ],
)
def test_wrong_values_are_refused(step_size, noise_std, message):
    with pytest.raises(ValueError, match=message):
        table(step_size, noise_std, 4)


@pytest.mark.parametrize("value", ["0.1", None, True, [0.1]])
def test_what_is_no_schedule_is_refused(value):
    with pytest.raises(TypeError, match="a number or a callable"):
        table(value, 0.1, 2)


def test_wrong_parameters_are_refused():
    with pytest.raises(ValueError, match="power > 0"):
        polynomial(1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="end=nan"):
        cosine(1.0, math.nan)
    with pytest.raises(ValueError, match="epsilon > 0"):
        from_epsilon(0.0)
    with pytest.raises(ValueError, match="at least one step"):
        table(1.0, 0.1, 0)


def test_real_scalars_of_numpy_are_schedules():
    assert schedules.as_schedule(np.float32(0.5)) == schedules.constant(0.5)
    with pytest.raises(TypeError, match="got bool"):
        schedules.as_schedule(True)


def test_values_for_each_chain():
    values = torch.tensor([0.1, 0.2, 0.3])
    assert fastebm.schedules.evaluate(values, 4).shape == (4, 3)
    pair = fastebm.schedules.table(values, fastebm.schedules.linear(1.0, 0.0), 5)
    assert pair.shape == (5, 3, 2)
    assert torch.equal(pair[:, :, 0], values.expand(5, 3))
    assert torch.equal(pair[:, 1, 1], torch.linspace(1, 0, 5))
    rows = torch.rand(5, 3) + 0.1
    assert torch.equal(fastebm.schedules.table(rows, 0.0, 5)[..., 0], rows)
    values[0] = -1.0  # a schedule is a copy
    assert "0.1" in repr(fastebm.schedules.per_chain(torch.tensor([0.1, 0.2])))


def test_chains_with_steps_of_their_own_are_those_of_single_samplers():
    def energy(x):
        return (x.square() - 1).square().sum(1)

    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    step, noise = torch.tensor([0.01, 0.02, 0.03]), torch.tensor([0.1, 0.0, 0.3])
    together = fastebm.Langevin(energy, step, noise).sample(start, 10, seed=1)
    split = fastebm.Langevin(energy, step, noise).sample(start, 10, seed=1, batch_size=2)
    assert torch.equal(together, split)
    for i in range(3):
        alone = fastebm.Langevin(energy, float(step[i]), float(noise[i]))
        assert torch.equal(together[i], alone.sample(start[i : i + 1], 10, seed=1, chain_ids=i)[0])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: fastebm.schedules.per_chain(torch.zeros(2, 2, 2)), ValueError, r"shape \(B,\) or \(S, B\)"),
        (lambda: fastebm.schedules.per_chain(torch.zeros(0)), ValueError, r"shape \(B,\) or \(S, B\)"),
        (lambda: fastebm.schedules.per_chain(torch.tensor([1.0, float("nan")])), ValueError, "finite"),
        (lambda: fastebm.schedules.per_chain([1.0, 2.0]), TypeError, "a tensor of real numbers"),
        (
            lambda: fastebm.Langevin(squares, torch.tensor([0.1, -0.1]), 0.1),
            ValueError,
            "step 0 of 2 of chain 1",
        ),
        (
            lambda: fastebm.Langevin(squares, torch.ones(2), torch.ones(3)),
            ValueError,
            r"numbers of chains: \[2, 3\]",
        ),
        (
            lambda: fastebm.Langevin(squares, torch.ones(2), 0.1).sample(torch.zeros(3, 1), 1),
            ValueError,
            "there are 3",
        ),
        (
            lambda: fastebm.Langevin(squares, torch.ones(4, 2), 0.1).sample(torch.zeros(2, 1), 3),
            ValueError,
            "for 4 updates, but the chain has 3",
        ),
        (lambda: fastebm.Cascade(squares, step_size=torch.ones(2)), TypeError, "of a cascade"),
    ],
)
def test_values_for_each_chain_that_do_not_fit_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def squares(x):
    return x.square().flatten(1).sum(1)


@pytest.mark.parametrize("levels", range(1, 8))
@pytest.mark.parametrize("num_steps", [1, 2, 3, 15, 20, 75, 1000])
def test_each_of_several_values_has_equally_many_updates(levels, num_steps):
    values = [float(2**k) for k in range(levels)]
    found = schedules.evaluate(piecewise_constant(*values), levels * num_steps)
    assert found.tolist() == [value for value in values for _ in range(num_steps)]


def test_a_schedule_in_parts_needs_finite_values():
    with pytest.raises(ValueError, match="needs at least one value"):
        piecewise_constant()
    with pytest.raises(ValueError, match="value 1=nan"):
        piecewise_constant(1.0, math.nan)
    assert repr(piecewise_constant(1, 4)) == "piecewise_constant(1, 4)"
