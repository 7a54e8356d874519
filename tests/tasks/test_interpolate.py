"""Paths: their ends, their starts' distribution, a barrier that can be gone around; neighbours by hand."""

import pytest
import torch
from torch import Tensor

from fastebm.data import Images, digits, to_float
from fastebm.tasks import PathOptions, interpolate_chains, interpolate_images, nearest_images
from fastebm.tasks.interpolate import _between_uniform, _redistribute
from fastebm.training import CoarseToFineRun


def test_between_uniform_starts_are_uniform() -> None:
    first, second = (torch.rand(1, 20000, generator=torch.Generator().manual_seed(k)) * 2 - 1 for k in (1, 2))
    path = _between_uniform(first, second, 5)[0]
    assert torch.equal(path[0], first[0])
    assert torch.equal(path[4], second[0])
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    for point in path:
        torch.testing.assert_close(point.quantile(quantiles), 2 * quantiles - 1, atol=0.03, rtol=0)


@pytest.mark.parametrize("between", ["noise", "coarse"])
def test_the_first_end_is_a_sample_of_the_run(run: CoarseToFineRun, between: str) -> None:
    path = interpolate_chains(run, between, pairs=2, points=4, seed=7)  # type: ignore[arg-type]
    assert path.images.shape == (2, 4, 1, 8, 8)
    assert torch.equal(path.images[:, 0], run.sample(4, seed=7)[::2])
    split = interpolate_chains(run, between, pairs=2, points=4, seed=7, batch_size=3)  # type: ignore[arg-type]
    torch.testing.assert_close(path.images, split.images, atol=1e-5, rtol=0)


def ring(x: Tensor) -> Tensor:
    return (x.square().sum((1, 2, 3)) - 0.25).square()


def test_a_path_goes_around_a_barrier_and_keeps_its_ends() -> None:
    first = torch.tensor([0.5, 0.0]).reshape(1, 1, 1, 2)
    second = torch.tensor([-0.45, 0.2]).reshape(1, 1, 1, 2)
    path = interpolate_images(ring, first, second, PathOptions(points=9, iterations=200, step_size=0.5))
    assert torch.equal(path.relaxed[:, 0], first)
    assert torch.equal(path.relaxed[:, -1], second)
    ends = path.energy_straight[0, [0, -1]].max()
    assert float(path.energy_straight.max() - ends) > 0.05
    assert float(path.energy_relaxed.max() - ends) < 0.01
    num_steps = path.relaxed.flatten(2).diff(dim=1).norm(dim=2)
    torch.testing.assert_close(num_steps, num_steps.mean().expand_as(num_steps), atol=0.02, rtol=0)


def test_a_relaxed_path_is_never_worse_and_does_not_depend_on_batches(run: CoarseToFineRun) -> None:
    images = digits("test")[0]
    options = PathOptions(points=5, iterations=4)
    whole, split = (interpolate_images(run, images[:3], images[3:6], options, batch_size=size) for size in (None, 2))
    torch.testing.assert_close(whole.relaxed, split.relaxed, atol=1e-5, rtol=0)
    assert (whole.energy_relaxed.max(1).values <= whole.energy_straight.max(1).values).all()


def test_points_are_redistribute_along_the_line() -> None:
    path = torch.tensor([0.0, 1.0, 2.0, 8.0]).reshape(1, 4, 1)
    torch.testing.assert_close(_redistribute(path).flatten(), torch.tensor([0.0, 8 / 3, 16 / 3, 8.0]))
    assert torch.equal(_redistribute(torch.ones(1, 4, 1)), torch.ones(1, 4, 1))


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_neighbours_are_the_nearest_in_order(batch_size: int) -> None:
    pixels = torch.randint(0, 256, (9, 1, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    reference = to_float(pixels)
    images = torch.cat((reference[4:5], torch.zeros(1, 1, 3, 3)))
    near = nearest_images(images, Images(pixels), 4, batch_size=batch_size)
    expected, order = torch.cdist(images.flatten(1).double(), reference.flatten(1).double()).sort(1)
    assert torch.equal(near.indices, order[:, :4])
    torch.testing.assert_close(near.distances, expected[:, :4].float())
    assert float(near.distances[0, 0]) == 0
    assert torch.equal(near.images, reference[near.indices])
    assert torch.equal(near.indices, nearest_images(images, reference, 4).indices)
