"""Nearest distances against a computation by hand."""

import pytest
import torch

from fastebm.evaluation import nearest_distances


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_distances_are_those_of_the_nearest(batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, reference = torch.rand(7, 2, 3, 3, generator=generator), torch.rand(5, 2, 3, 3, generator=generator)
    expected = [min(float((x - y).double().square().sum().sqrt()) for y in reference) for x in images]
    distances = nearest_distances(images, reference, batch_size=batch_size)
    torch.testing.assert_close(distances, torch.tensor(expected))


def test_a_copy_is_at_exactly_zero_even_far_from_the_origin() -> None:
    reference = torch.rand(10, 64) + 1000
    assert nearest_distances(reference.flip(0), reference).tolist() == [0.0] * 10


def test_shapes_that_do_not_fit_are_refused() -> None:
    for images, reference in ((torch.zeros(2, 3), torch.zeros(2, 4)), (torch.zeros(2, 3), torch.zeros(0, 3))):
        with pytest.raises(ValueError, match="one shape"):
            nearest_distances(images, reference)
    assert nearest_distances(torch.zeros(0, 3), torch.zeros(2, 3)).shape == (0,)
