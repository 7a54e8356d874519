"""The comparison with another revision: what counts as a regression, and the processes that measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.compare_revisions import Worker, WorkerError, check_regression
from benchmarks.harness.workloads import Workload

ROOT = Path(__file__).resolve().parents[3]
NORMAL = Workload("normal", "float32", (1, 4, 4), 2, "float32")
CHAINS = Workload("chains", "CF-EBM", (1, 8, 8), 2, "bfloat16", num_steps=2)

BASE = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.0, 1.01, 0.99]


@pytest.mark.parametrize(
    ("factors", "regressed"),
    [
        ([1.0] * 10, False),
        ([0.5] * 10, False),
        ([1.09] * 10, False),
        ([1.2] * 10, True),
        ([3.0] * 10, True),
        # The median is beyond the limit, but a third of the rounds says the opposite.
        ([1.3] * 6 + [0.9] * 4, False),
        # One lucky round does not save it.
        ([1.3] * 9 + [0.9], True),
        # One disturbed round does not condemn it.
        ([1.0] * 9 + [5.0], False),
    ],
)
def test_a_regression_is_beyond_the_limit_and_beyond_noise(factors: list[float], regressed: bool) -> None:
    now = [seconds * factor for seconds, factor in zip(BASE, factors, strict=True)]
    found = check_regression(now, BASE)
    assert found.regressed is regressed
    assert ("REGRESSION" in str(found)) is regressed


def test_drift_of_the_machine_is_no_regression() -> None:
    drift = [1.0, 1.5, 2.0, 3.0, 4.0]
    assert check_regression(drift, [0.99 * value for value in drift]).ratio.median == pytest.approx(1 / 0.99)
    assert not check_regression(drift, [0.99 * value for value in drift]).regressed


def test_the_limit_can_be_another() -> None:
    assert check_regression([1.06] * 5, [1.0] * 5, limit=1.05).regressed
    assert not check_regression([1.06] * 5, [1.0] * 5).regressed


def test_a_worker_measures_and_says_what_fails() -> None:
    worker = Worker([ROOT], ROOT)
    try:
        with pytest.raises(WorkerError, match="nothing was prepared"):
            worker.ask({"repeats": 1})
        assert worker.ask({"prepare": NORMAL.to_json()}) > 0
        assert worker.ask({"repeats": 3}) > 0
        unknown = CHAINS.to_json() | {"engine": "steam"}
        with pytest.raises(WorkerError, match="ValueError: engine is 'steam'"):
            worker.ask({"prepare": unknown})
    finally:
        worker.stop()


def test_a_worker_that_finds_another_fastebm_says_so(tmp_path: Path) -> None:
    worker = Worker([ROOT], tmp_path)
    try:
        with pytest.raises(WorkerError, match=f"not from {tmp_path}"):
            worker.ask({"prepare": NORMAL.to_json()})
    finally:
        worker.stop()
