import pytest
import torch
import torch.nn.functional as F

from fastebm.data import average_pool_to, pyramid


def test_levels_are_average_pools_of_each_other():
    images = torch.rand(3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    levels = pyramid(images, 4)
    assert list(levels) == [4, 8, 16, 32]
    assert levels[32] is images
    for size in (4, 8, 16):
        assert torch.equal(levels[size], F.avg_pool2d(levels[2 * size], 2))
        assert torch.equal(levels[size], average_pool_to(images, size))
    torch.testing.assert_close(levels[4], F.avg_pool2d(images, 8))


def test_sizes_that_are_no_power_of_two():
    assert list(pyramid(torch.zeros(1, 1, 12, 12), 3)) == [3, 6, 12]
    assert list(pyramid(torch.zeros(0, 1, 8, 8), 8)) == [8]
    assert average_pool_to(torch.zeros(0, 1, 8, 8), 2).shape == (0, 1, 2, 2)


@pytest.mark.parametrize("size", [0, -4, 4, 5, 16, 24])
def test_refuses_sizes_that_halving_does_not_reach(size):
    for function in (average_pool_to, pyramid):
        with pytest.raises(ValueError, match=f"size 12 can't be halved to size {size}"):
            function(torch.zeros(1, 1, 12, 12), size)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (1, 1, 8, 4)])
def test_refuses_what_is_no_square_image(shape):
    with pytest.raises(ValueError, match=r"\(N, C, s, s\)"):
        average_pool_to(torch.zeros(shape), 4)
