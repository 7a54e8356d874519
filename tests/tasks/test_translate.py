"""Translation against closed forms, at full size and from a lower level."""

import pytest
import torch
from torch import Tensor

from fastebm.tasks import TranslateOptions, translate
from fastebm.training import CoarseToFineRun

MEAN, STD = 0.3, 0.2


def quadratic(x: Tensor) -> Tensor:
    return (x - MEAN).square().sum((1, 2, 3)) / (2 * STD**2)


def test_translation_is_a_known_contraction_with_its_moments() -> None:
    source = torch.linspace(-0.5, 0.5, 32).reshape(2, 1, 4, 4)
    options = TranslateOptions(num_steps=10, step_size=0.004, start_noise=0.0, snapshots=5)
    result = translate(quadratic, source, options)
    assert result.snapshot_steps == (0, 2, 4, 6, 8, 10)
    for step, moment in zip(result.snapshot_steps, result.snapshots, strict=True):
        torch.testing.assert_close(moment, MEAN + (1 - 0.004 / STD**2) ** step * (source - MEAN))
    torch.testing.assert_close(result.change, (result.images - source).abs()[:, 0])
    assert (result.energy.diff(dim=0) < 0).all()


def test_translation_does_not_depend_on_batches_or_moments(run: CoarseToFineRun, images: Tensor) -> None:
    options = TranslateOptions(num_steps=6, noise_std=0.05, snapshots=6)
    whole, split = (translate(run, images, options, seed=1, batch_size=size) for size in (None, 4))
    torch.testing.assert_close(whole.snapshots, split.snapshots, atol=1e-5, rtol=0)
    once = translate(run, images, TranslateOptions(num_steps=6, noise_std=0.05, snapshots=1), seed=1)
    assert torch.equal(whole.images, once.images)


def test_translation_from_a_lower_size_goes_up_through_the_levels(run: CoarseToFineRun, images: Tensor) -> None:
    options = TranslateOptions(num_steps=3, snapshots=1, start_size=4, start_noise=0.0)
    result = translate(run, images, options, seed=1)
    assert result.snapshot_steps == (0, 3, 6)
    assert result.snapshots.shape == (3, 6, 1, 8, 8)
    start = torch.nn.functional.avg_pool2d(images, 2)
    for moment, kept in zip(result.snapshots, (True, False, False), strict=True):
        assert torch.equal(moment[:, :, ::2, ::2], start) is kept
    # A pull of 1 / step_size leaves nothing but the source and a step down the energy from wherever the chain is.
    pulled = translate(run, images, TranslateOptions(3, 1.0, snapshots=1, start_size=4, data_weight=1.0), seed=1)
    assert pulled.change.mean() < result.change.mean()
    with pytest.raises(ValueError, match=r"start_size must be one of the run's levels, \[4, 8\], got 5"):
        translate(run, images, TranslateOptions(3, snapshots=1, start_size=5))


def test_a_pull_holds_at_the_source() -> None:
    source = torch.linspace(-0.5, 0.5, 32).reshape(2, 1, 4, 4)
    options = TranslateOptions(num_steps=200, step_size=0.005, start_noise=0.0, data_weight=25.0)
    expected = (MEAN / STD**2 + 25 * source) / (1 / STD**2 + 25)
    torch.testing.assert_close(translate(quadratic, source, options).images, expected, atol=1e-4, rtol=0)
