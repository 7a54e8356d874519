"""Numbers between two lines of the log: means, but for the largest energies; a checkpoint keeps them."""

from __future__ import annotations

import json
import math

import pytest

from fastebm.training.trainer.metrics import LogNumbers

UPDATES = [{"gap": 1.0, "largest_energy_data": 7.0}, {"gap": 3.0, "largest_energy_data": 2.0}]


def test_means_and_the_largest_since_the_last_line() -> None:
    numbers = LogNumbers()
    for update in UPDATES:
        numbers.add(update)
    assert numbers.pop() == {"gap": 2.0, "largest_energy_data": 7.0}
    numbers.add(UPDATES[1])
    assert numbers.pop() == UPDATES[1]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_number_that_is_none_is_not_lost(place: int) -> None:
    numbers = LogNumbers()
    for number in range(3):
        numbers.add({"largest_energy_data": math.nan if number == place else float(number)})
    assert math.isnan(numbers.pop()["largest_energy_data"])


def test_a_checkpoint_between_two_lines_keeps_them() -> None:
    numbers, resumed = LogNumbers(), LogNumbers()
    numbers.add(UPDATES[0])
    resumed.load_state_dict(json.loads(json.dumps(numbers.state_dict())))
    resumed.add(UPDATES[1])
    assert resumed.pop() == {"gap": 2.0, "largest_energy_data": 7.0}


def test_a_checkpoint_of_an_older_version_had_sums_of_all() -> None:
    numbers = LogNumbers()
    numbers.load_state_dict({"count": 2, "sums": {"gap": 4.0, "largest_energy_data": 9.0}})
    assert numbers.pop() == {"gap": 2.0, "largest_energy_data": 4.5}
    numbers.load_state_dict({})
    numbers.add(UPDATES[0])
    assert numbers.pop() == UPDATES[0]
    with pytest.raises(ValueError, match="sums of 0 numbers have no mean"):
        numbers.load_state_dict({"count": 0, "sums": {"largest_energy_data": 9.0}})
