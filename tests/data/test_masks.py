"""Random hole masks, and the fill of a hole by the mean of its neighbours."""

from __future__ import annotations

import torch

from fastebm.data import neighbour_mean, random_hole_masks


def test_fills_are_means_of_the_nearest_known_pixels() -> None:
    images = torch.arange(16.0).reshape(1, 1, 4, 4) / 16
    hole = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hole[0, 0, 0, 0] = hole[0, 0, 3, 2:] = True
    filled = neighbour_mean(images, hole)
    assert torch.equal(filled[~hole], images[~hole])
    torch.testing.assert_close(filled[hole] * 16, torch.tensor([10 / 3, (9 + 10 + 11 + 13) / 4, (10 + 11) / 2]))
    hole[:] = True
    hole[0, 0, 3, 3] = False
    torch.testing.assert_close(neighbour_mean(images, hole), torch.full_like(images, 15 / 16))


def test_random_holes_depend_on_seed_and_position_alone() -> None:
    holes = random_hole_masks(40, 8, seed=3, positions=2**40)
    assert holes.shape == (40, 1, 8, 8)
    assert holes.dtype == torch.bool
    assert torch.equal(random_hole_masks(7, 8, seed=3, positions=2**40 + 30), holes[30:37])
    assert not torch.equal(random_hole_masks(40, 8, seed=4, positions=2**40), holes)


def test_random_holes_are_rectangles_anywhere_or_pixels() -> None:
    holes = random_hole_masks(4000, 16, seed=1, positions=0)
    # A rectangle is the product of the rows and the columns that it touches.
    rows, columns = holes.any(3, keepdim=True), holes.any(2, keepdim=True)
    rectangles = (holes == rows & columns).flatten(1).all(1)
    assert 0.47 < float(rectangles.float().mean()) < 0.53
    height, width = (side.flatten(1).sum(1)[rectangles] for side in (rows, columns))
    long, short = torch.maximum(height, width), torch.minimum(height, width)
    assert (long.min(), long.max(), short.min(), short.max()) == (8, 16, 4, 8)
    assert 0.4 < float((height > width).float().mean()) < 0.6
    assert holes[rectangles].any(0).all()
    shares = holes[~rectangles].float().mean((1, 2, 3))
    assert 0.05 < float(shares.min()) < 0.3 < 0.7 < float(shares.max()) < 0.95


def test_small_images_have_holes_as_well() -> None:
    holes = random_hole_masks(500, 4, seed=1, positions=0)
    assert 0 < float(holes.float().mean()) < 1
    assert float(holes.flatten(1).any(1).float().mean()) > 0.99
