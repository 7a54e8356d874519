"""Hostile and careless tries with fixed seeds: a few in every run of the suite, 2,000 in `make fuzz`.

A test takes the fixture `tries`, makes that many tries from a `random.Random` with a fixed seed, and collects what went
wrong, each with the number of its try, so that one try can be run again by itself.
"""

from __future__ import annotations

import pytest

IN_THE_SUITE = 40


@pytest.fixture
def tries(request: pytest.FixtureRequest) -> int:
    """The number of tries: --tries, or a few."""
    given = request.config.getoption("--tries")
    return IN_THE_SUITE if given is None else int(given)
