"""Keys, streams and ids: the numbers that address noise."""

from __future__ import annotations

import pytest
import torch

from fastebm import rng
from tests.ops.philox_by_hand import words


def test_numbers_of_streams_never_change():
    """A number that changed would change every user's noise."""
    assert {stream.name: int(stream) for stream in rng.Stream} == {
        "LANGEVIN": 0,
        "INITIAL": 1,
        "MOMENTUM": 2,
        "ACCEPTANCE": 3,
        "PRIOR": 4,
        "DATA_NOISE": 5,
        "AUGMENTATION": 6,
        "RESTART": 7,
        "SHUFFLE": 8,
        "RESEED": 9,
        "POSTERIOR": 10,
        "NOISY_START": 11,
        "HOLE": 12,
        "MOMENTUM_END": 13,
        "SWAP": 14,
        "BUFFER_DRAW": 15,
        "BUFFER_RESTART": 16,
        "BUFFER_NOISE": 17,
        "TRAJECTORY_LENGTH": 18,
        "REFRESH": 19,
        "PROJECTION": 20,
        "MINIBATCH": 21,
    }


def test_derived_seeds_are_bits_of_their_own_stream():
    for seed in (0, 5, 2**63 + 9, -3):
        assert rng.fold_in_seed(seed, 0) == seed
        for index in (1, 2, 1000):
            low, high, _, _ = words(seed, index, 0, rng.Stream.RESEED, 0)
            assert rng.fold_in_seed(seed, index) == low | high << 32
    for arguments in ((2**64, 1), (0, -1), (0, 2**32)):
        with pytest.raises(ValueError, match="must"):
            rng.fold_in_seed(*arguments)


@pytest.mark.parametrize(
    ("seed", "stored"), [(0, 0), (-1, -1), (2**64 - 1, -1), (2**63, -(2**63)), (2**63 - 1, 2**63 - 1), (5, 5)]
)
def test_key_holds_the_64_bits_of_a_seed(seed, stored):
    key = rng.make_key(seed, 2**32 - 1, 7)
    assert key.dtype == torch.int64
    assert key.tolist() == [stored, 2**32 - 1, 7]


def test_key_checks_its_numbers():
    for arguments in ((2**64,), (-(2**63) - 1,), (0, 2**32), (0, -1), (0, 0, -1)):
        with pytest.raises(ValueError, match="must"):
            rng.make_key(*arguments)


def test_chain_ids():
    assert rng.make_chain_ids(2**56 - 3, 3).tolist() == [2**56 - 3]
    listed = torch.tensor([4, 2, 9])
    assert rng.make_chain_ids(listed, 3) is listed
    assert rng.make_chain_ids(0, 0).tolist() == [0]
    assert rng.make_chain_ids(torch.empty(0, dtype=torch.int64), 0).shape == (0,)


def test_chain_ids_checks_its_numbers():
    for chain_ids in (2**56 - 2, -1, torch.tensor([0, 1, 2**56]), torch.tensor([0, 1, -1]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="chain"):
            rng.make_chain_ids(chain_ids, 3)
    for chain_ids in (1.0, True, "1", torch.zeros(3), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(TypeError, match="chain_ids must be"):
            rng.make_chain_ids(chain_ids, 3)


def test_draw_seed_is_governed_by_torch():
    torch.manual_seed(11)
    first = rng.draw_seed()
    assert first != rng.draw_seed()
    torch.manual_seed(11)
    assert rng.draw_seed() == first


def test_streams_of_ones_own_are_nobody_elses():
    own = [rng.own_stream(use) for use in range(128)]
    assert len({*own}) == 128
    assert not {*own} & {int(stream) for stream in rng.Stream}
    assert [rng.check_stream(stream) for stream in own] == own
    for wrong in (-1, 128):
        with pytest.raises(ValueError, match=r"use must be in \[0, 128\)"):
            rng.own_stream(wrong)
