"""When a revision counts as slower."""

import pytest

from fastebm.evaluation.speed import verdict

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
    found = verdict(now, BASE)
    assert found.regressed is regressed
    assert ("REGRESSION" in str(found)) is regressed


def test_drift_of_the_machine_is_no_regression() -> None:
    drift = [1.0, 1.5, 2.0, 3.0, 4.0]
    assert verdict(drift, [0.99 * value for value in drift]).ratio.median == pytest.approx(1 / 0.99)
    assert not verdict(drift, [0.99 * value for value in drift]).regressed


def test_the_limit_can_be_another() -> None:
    assert verdict([1.06] * 5, [1.0] * 5, limit=1.05).regressed
    assert not verdict([1.06] * 5, [1.0] * 5).regressed
