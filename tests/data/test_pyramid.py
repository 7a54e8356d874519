"""Resolution pyramids: levels are average pools, with the same bits whether they are kept or not."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from fastebm.data import ImagePyramid, Images, average_pool_to, pyramid

pyramid_module = importlib.import_module("fastebm.data.pyramid")  # its function has the same name


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


def image_set(count: int = 7, size: int = 32) -> Images:
    generator = torch.Generator().manual_seed(1)
    return Images(torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator))


@pytest.mark.parametrize("cache_bytes", [0, 7 * 3 * 4 * 4 * 4, 2**30])
def test_batches_of_a_pyramid_are_the_same_however_much_is_kept(cache_bytes, monkeypatch):
    monkeypatch.setattr(pyramid_module, "_AT_ONCE", 3 * 3 * 32 * 32)  # levels are made of 3, 3 and 1 images
    images = image_set()
    levels = ImagePyramid(images, 4, cache_bytes=cache_bytes)
    assert (levels.sizes, len(levels)) == ((4, 8, 16, 32), 7)
    exact = pyramid(images.pixels.double() * 2 - 255, 4)
    rounded = pyramid(images.batch(slice(None)), 4)
    for indices in (torch.tensor([6, 0, 0, 3]), torch.tensor([2])):
        for size in levels.sizes:
            batch = levels.batch(size, indices)
            assert batch.dtype == torch.float32
            assert torch.equal(batch, exact[size][indices].float() * torch.tensor(1 / 255))
            assert (batch - rounded[size][indices]).abs().max() < 1e-6
            assert torch.equal(levels.batch(size, indices[-1:]), batch[-1:])
    assert torch.equal(levels.batch(32, torch.tensor([2])), images.batch(torch.tensor([2])))


def test_a_pyramid_keeps_what_fits():
    images = image_set()
    for levels_kept, cache_bytes in enumerate((1343, 1344, 1344 + 5376, 1344 + 5376 + 21504)):
        levels = ImagePyramid(images, 4, cache_bytes=cache_bytes)
        for size in levels.sizes:
            levels.batch(size, torch.arange(7))
        kept = [size for size, level in levels._cache.items() if level is not None]
        assert kept == [4, 8, 16][:levels_kept]


def test_a_pyramid_refuses():
    with pytest.raises(ValueError, match="size 32 can't be halved to size 5"):
        ImagePyramid(image_set(), 5)
    with pytest.raises(ValueError, match=r"\(N, C, s, s\)"):
        ImagePyramid(Images(torch.zeros(1, 1, 4, 8, dtype=torch.uint8)), 4)
    with pytest.raises(ValueError, match="size 64 is not a level; the levels are 8, 16, 32"):
        ImagePyramid(image_set(), 8).batch(64, torch.tensor([0]))
    assert ImagePyramid(image_set(size=28), 7).sizes == (7, 14, 28)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_have_the_same_bits_on_a_gpu():
    images = image_set()
    for moved in (images, images.to("cuda")):
        for cache_bytes in (0, 2**30):
            levels = ImagePyramid(moved, 4, cache_bytes=cache_bytes)
            for size in levels.sizes:
                batch = levels.batch(size, torch.arange(7), "cuda")
                assert batch.device.type == "cuda"
                assert torch.equal(batch.cpu(), ImagePyramid(images, 4).batch(size, torch.arange(7)))
