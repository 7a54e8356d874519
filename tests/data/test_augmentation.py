"""Flips and noise of training images are functions of the seed and the image's position alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastebm import rng
from fastebm.data import Images, add_noise, batches, flip
from fastebm.ops import normal

IMAGES = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def noisy(images: Tensor, *, seed: int, positions: int | Tensor) -> Tensor:
    return add_noise(images, 0.03, seed=seed, positions=positions)


def flipped(images: Tensor, seed: int, positions: int) -> Tensor:
    """Which images a flip mirrored, (B,)."""
    done = flip(images, seed=seed, positions=positions)
    mirrored = (done == images.flip(3)).flatten(1).all(1)
    assert torch.equal(~mirrored, (done == images).flatten(1).all(1))
    return mirrored


@pytest.mark.parametrize("function", [flip, noisy])
@pytest.mark.parametrize("split", [1, 7, 32, 63])
def test_a_batch_may_be_split(function: Callable[..., Tensor], split: int) -> None:
    whole = function(IMAGES, seed=3, positions=100)
    parts = [
        function(IMAGES[:split], seed=3, positions=100),
        function(IMAGES[split:], seed=3, positions=torch.arange(100 + split, 164)),
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("function", [flip, noisy])
def test_other_seeds_and_positions_differ(function: Callable[..., Tensor]) -> None:
    results = [function(IMAGES, seed=seed, positions=first) for seed in (0, 1, 2**63) for first in (0, 64, 2**40)]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("function", [flip, noisy])
def test_reads_no_other_random_state(function: Callable[..., Tensor]) -> None:
    state = torch.get_rng_state()
    function(IMAGES, seed=0, positions=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_are_flipped_and_each_as_a_whole() -> None:
    """Of 100,000 fair flips 50,000 +- 791 are expected, five standard deviations."""
    image = IMAGES[:1, :1, :1, :2].expand(100_000, -1, -1, -1)
    assert abs(int(flipped(image, 0, 0).sum()) - 50_000) < 791
    again = flipped(image, 0, 100_000)
    assert abs(int((again == flipped(image, 0, 0)).sum()) - 50_000) < 791


def test_flips_bytes_as_well() -> None:
    pixels = (IMAGES * 255).to(torch.uint8)
    assert torch.equal(flip(pixels, seed=0, positions=5).float(), flip(pixels.float(), seed=0, positions=5))


def test_noise_is_that_of_its_stream() -> None:
    noise = normal(IMAGES.shape, seed=7, stream=rng.Stream.DATA_NOISE, chain_ids=9)
    assert torch.equal(add_noise(IMAGES, 0.03, seed=7, positions=9), IMAGES + 0.03 * noise)
    assert torch.equal(add_noise(IMAGES, 0, seed=7, positions=9), IMAGES)


def test_a_resumed_run_sees_the_same() -> None:
    """Order, flips and noise of batch 5, from the beginning and from there."""
    data = Images((IMAGES[:10] * 255).to(torch.uint8))

    def seen(start: int, num_steps: int) -> list[Tensor]:
        order = batches(data, 4, 1, start)
        found = []
        for step in range(start, start + num_steps):
            real = flip(data.batch(next(order)), seed=1, positions=4 * step)
            found.append(add_noise(real, 0.1, seed=1, positions=4 * step))
        return found

    assert all(torch.equal(a, b) for a, b in zip(seen(0, 9)[5:], seen(5, 4), strict=True))


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), got \(3, 8, 8\)"):
        flip(IMAGES[0], seed=0, positions=0)
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.1"):
        add_noise(IMAGES, -0.1, seed=0, positions=0)
    with pytest.raises(ValueError, match=r"\[0, 2\^56\)"):
        flip(IMAGES, seed=0, positions=2**56 - 63)
