"""Inpainting: known pixels stay in every bit, chains are ordered by energy, batches do not matter."""

import itertools

import pytest
import torch
from torch import Tensor

from fastebm.tasks import InpaintOptions, hole_mask, inpaint
from fastebm.training import CoarseToFineRun

MEAN, STD = 0.3, 0.2


def quadratic(x: Tensor) -> Tensor:
    return (x - MEAN).square().sum((1, 2, 3)) / (2 * STD**2)


@pytest.mark.parametrize(("coarse", "pattern"), list(itertools.product((False, True), ("square", "pixels", "half"))))
def test_known_pixels_are_kept_to_the_bit_and_batches_do_not_matter(
    run: CoarseToFineRun, images: Tensor, coarse: bool, pattern: str
) -> None:
    hole = hole_mask(pattern, len(images), 8, seed=1)  # type: ignore[arg-type]
    options = InpaintOptions(num_steps=3, restarts=3, coarse=coarse)
    whole = inpaint(run, images, hole, options, seed=1, batch_size=None)
    assert whole.filled.shape == (6, 3, 1, 8, 8)
    known = (~hole)[:, None].expand_as(whole.filled)
    assert torch.equal(whole.filled[known], images[:, None].expand_as(whole.filled)[known])
    assert (whole.energy.diff(dim=1) >= 0).all()
    assert (whole.diversity > 0).all()
    split = inpaint(run, images, hole, options, seed=1, batch_size=4)
    torch.testing.assert_close(whole.filled, split.filled, atol=1e-5, rtol=0)
    # What is in the hole was not looked at.
    erased = inpaint(run, torch.where(hole, 0.0, images), hole, options, seed=1)
    assert torch.equal(whole.filled, erased.filled)


def test_a_hole_at_full_size_starts_at_its_surroundings() -> None:
    images = torch.arange(16.0).reshape(1, 1, 4, 4) / 16
    hole = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    hole[0, 0, 3, 3] = False
    result = inpaint(lambda x: 0 * x.sum((1, 2, 3)), images, hole, InpaintOptions(1, 1.0, 0.0, restarts=2))
    assert 0 < float((result.filled - 15 / 16).abs().max()) <= 0.03 + 1e-6


def test_inpainting_orders_by_energy_and_finds_the_mean() -> None:
    images = torch.full((2, 1, 4, 4), 0.7)
    result = inpaint(
        quadratic, images, hole_mask("square", 2, 4), InpaintOptions(num_steps=100, step_size=0.01, restarts=4)
    )
    inner = result.filled[..., 1:3, 1:3]
    assert float((inner - MEAN).abs().max()) < 0.1
    expected = torch.stack([quadratic(chain) for chain in result.filled.unbind(1)], 1)
    torch.testing.assert_close(result.energy, expected)
    errors = result.errors()
    assert float(errors["best"].mean()) == pytest.approx(0.4, abs=0.05)
    # Over the hole; the mean of the chains is nearer than they are by their own variance.
    torch.testing.assert_close(result.mean[..., 1:3, 1:3], inner.mean(1))
    assert torch.equal(result.mean[..., 0, :], images[..., 0, :])
    spread = inner.var(1, correction=0).flatten(1).mean(1)
    each = (inner - images[:, None, :, 1:3, 1:3]).square().flatten(2).mean(2)
    torch.testing.assert_close(errors["mean"].square() + spread, each.mean(1))
    torch.testing.assert_close(errors["nearest"], each.min(1).values.sqrt())
