"""The order of training images: permutations per epoch that can start anywhere."""

from itertools import islice

import pytest
import torch

from fastebm.data import batches


def take(count: int, *args) -> list[list[int]]:
    return [batch.tolist() for batch in islice(batches(*args), count)]


@pytest.mark.parametrize(("images", "batch_size"), [(10, 5), (10, 3), (7, 7), (3, 10), (1, 1), (1, 4), (1000, 128)])
def test_every_epoch_is_a_permutation(images, batch_size):
    epochs = 4
    num_steps = -(-epochs * images // batch_size)
    stream = [i for batch in take(num_steps, torch.zeros(images, 2), batch_size, 5) for i in batch]
    for epoch in range(epochs):
        assert sorted(stream[epoch * images : (epoch + 1) * images]) == list(range(images))


def test_shape_and_type():
    batch = next(batches(torch.zeros(10), 4, 0))
    assert (batch.shape, batch.dtype) == ((4,), torch.int64)


@pytest.mark.parametrize(("images", "batch_size"), [(10, 3), (3, 10), (8, 8)])
def test_starts_anywhere(images, batch_size):
    data = range(images)
    whole = take(40, data, batch_size, 9)
    for start in (0, 1, 2, 3, 7, 25):
        assert take(15, data, batch_size, 9, start) == whole[start : start + 15]


def test_epochs_and_seeds_differ():
    data = range(100)
    orders = [take(1, data, 100, seed, epoch)[0] for seed in (0, 1, 2**63) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9
    assert all(order != sorted(order) for order in orders)


def test_reads_no_other_random_state():
    state = torch.get_rng_state()
    take(5, range(10), 4, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_shuffles_evenly():
    """Where image 0 falls in 2,000 epochs of 10: a chi-square statistic of 9 degrees of freedom, 99.9 % below 27.9."""
    positions = torch.tensor([order.index(0) for order in take(2000, range(10), 10, 1)])
    counts = torch.bincount(positions, minlength=10).double()
    assert ((counts - 200).square() / 200).sum() < 27.9


@pytest.mark.parametrize(("images", "batch_size", "start"), [(0, 1, 0), (5, 0, 0), (5, 1, -1)])
def test_refuses_at_once(images, batch_size, start):
    with pytest.raises(ValueError, match=f"{images} images, batch_size {batch_size} and start_step {start}"):
        batches(range(images), batch_size, 0, start)
