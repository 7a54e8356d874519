"""Rounds, quantiles and ratios, on cases that only count how often they are run."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastebm.evaluation.speed import Summary, interleaved, ratios
from fastebm.evaluation.speed import measurement as measured


class Clock:
    """A time that passes only when a case says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        monkeypatch.setattr(measured.time, "perf_counter", lambda: self.now)

    def case(self, name: str, seconds: float):
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run


def test_every_round_runs_every_case_and_times_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times = interleaved({"a": clock.case("a", 0.5), "b": clock.case("b", 0.004)}, 6, "cpu", slice_seconds=0.02)
    assert times["a"] == pytest.approx([0.5] * 6)
    assert times["b"] == pytest.approx([0.004] * 6)
    # The slow one is run once a round, the fast one until a slice is full: 5 times, or 4 after rounding.
    rounds = clock.log[clock.log.index("b", 1) + 5 :]
    assert rounds.count("a") == 6
    assert rounds.count("b") in (24, 30)


def test_orders_are_shuffled_and_rounds_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    names = ["a", "b", "c"]
    interleaved({name: clock.case(name, 1.0) for name in names}, 20, "cpu", warm=True)
    rounds = [clock.log[i : i + 3] for i in range(3, 63, 3)]
    assert all(sorted(order) == names for order in rounds)
    assert len({tuple(order) for order in rounds}) > 2


def test_a_budget_takes_rounds_away_but_not_the_last_three(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    case = {"a": clock.case("a", 1.0)}
    assert len(interleaved(case, 20, "cpu", budget_seconds=7.0)["a"]) == 7
    assert len(interleaved(case, 20, "cpu", budget_seconds=0.1)["a"]) == 3
    assert len(interleaved(case, 2, "cpu", budget_seconds=0.1)["a"]) == 2
    assert len(interleaved(case, 20, "cpu", budget_seconds=1e9)["a"]) == 20


def test_warm_cases_are_not_run_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    interleaved({"a": clock.case("a", 1.0)}, 3, "cpu", warm=True)
    assert len(clock.log) == 1 + 3
    clock.log.clear()
    interleaved({"a": clock.case("a", 1.0)}, 3, "cpu")
    assert len(clock.log) == 2 + 3


def test_another_clock_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Clock(monkeypatch)
    times = interleaved({"a": wall.case("a", 1.0)}, 3, "cpu", warm=True, clock=lambda: 2 * wall.now)
    assert times == {"a": [2.0] * 3}


def test_real_time_passes() -> None:
    times = interleaved({"sum": lambda: sum(range(1000))}, 3, "cpu", slice_seconds=0.001)
    assert all(seconds > 0 for seconds in times["sum"])


def test_rounds_must_be_at_least_one() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        interleaved({"a": lambda: None}, 0, "cpu")


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40))
def test_a_summary_lies_within_its_figures(values: list[float]) -> None:
    summary = Summary.of(values)
    assert summary.low <= summary.median <= summary.high
    assert min(values) <= summary.median <= max(values)
    assert (summary.low, summary.high) == pytest.approx((max(summary.low, min(values)), min(summary.high, max(values))))
    assert summary.median == pytest.approx(statistics.median(values))


def test_quantiles_are_those_of_a_fifth() -> None:
    values = list(range(101))
    random.Random(0).shuffle(values)
    assert Summary.of([float(value) for value in values]) == Summary(50.0, 20.0, 80.0)
    with pytest.raises(ValueError, match="at least one figure"):
        Summary.of([])


def test_ratios_are_taken_round_by_round() -> None:
    # A machine that becomes twice as slow halfway changes all times and no ratio.
    ours, other = [1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 6.0, 6.0]
    assert ratios(other, ours) == [3.0] * 4
    with pytest.raises(ValueError, match="3 rounds on 4"):
        ratios(other[:3], ours)
