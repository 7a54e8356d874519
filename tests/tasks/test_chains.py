"""Denoising, inpainting and translation against closed forms, and the same bits for any batch split."""

import itertools

import pytest
import torch
from torch import Tensor

from fastebm import energy_gradient
from fastebm.data import digits
from fastebm.tasks import (
    ClassicalDenoiser,
    DenoiseOptions,
    InpaintOptions,
    TranslateOptions,
    add_noise,
    denoise,
    hole_mask,
    inpaint,
    translate,
    tune_denoising,
)
from fastebm.training import CoarseToFineRun

MEAN, STD = 0.3, 0.2


def quadratic(x: Tensor) -> Tensor:
    return (x - MEAN).square().sum((1, 2, 3)) / (2 * STD**2)


@pytest.fixture
def images() -> Tensor:
    return digits("test")[0][:6]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_data_term_leads_to_the_mean_of_the_posterior(temperature: float) -> None:
    noise = 0.1
    noisy = add_noise(torch.full((3, 2, 4, 4), 0.4), noise, seed=3)
    options = DenoiseOptions(num_steps=200, step_size=0.005, temperature=temperature)
    restored = denoise(quadratic, noisy, noise, options).restored
    energy, data = 1 / STD**2, temperature / noise**2
    torch.testing.assert_close(restored, (energy * MEAN + data * noisy) / (energy + data), atol=1e-4, rtol=0)


def test_without_data_term_steps_go_down_the_energy() -> None:
    noisy = torch.linspace(-0.9, 0.9, 16).reshape(1, 1, 4, 4)
    restored = denoise(quadratic, noisy, 0.1, DenoiseOptions(num_steps=3, step_size=0.01)).restored
    torch.testing.assert_close(restored, MEAN + (1 - 0.01 / STD**2) ** 3 * (noisy - MEAN))


def test_noise_is_that_of_the_image_however_images_are_split() -> None:
    images = torch.zeros(2000, 1, 4, 4)
    noisy = add_noise(images, 0.5, seed=1)
    assert abs(float(noisy.std()) - 0.5) < 0.01
    assert torch.equal(add_noise(images[7:9], 0.5, seed=1, first=7), noisy[7:9])


def test_by_the_fused_engine_batches_do_not_change_a_bit(fused_run: CoarseToFineRun, images: Tensor) -> None:
    noisy = add_noise(images, 0.2, seed=1)
    options = DenoiseOptions(num_steps=2, temperature=0.01, noise_std=0.05, start_size=4)
    whole, split = (denoise(fused_run, noisy, 0.2, options, seed=5, batch_size=size) for size in (None, 4))
    assert torch.equal(whole.restored, split.restored)
    assert torch.equal(whole.energy_after, split.energy_after)


@pytest.mark.parametrize("start_size", [None, 4])
def test_denoising_does_not_depend_on_batches(run: CoarseToFineRun, images: Tensor, start_size: int | None) -> None:
    noisy = add_noise(images, 0.2, seed=1)
    options = DenoiseOptions(num_steps=3, temperature=0.01, noise_std=0.05, start_size=start_size)
    whole, split = (denoise(run, noisy, 0.2, options, seed=5, batch_size=size) for size in (None, 2))
    torch.testing.assert_close(whole.restored, split.restored, atol=1e-5, rtol=0)
    assert not torch.equal(whole.restored, denoise(run, noisy, 0.2, options, seed=6).restored)
    assert whole.restored.abs().max() <= 1


def test_several_chains_are_averaged() -> None:
    noisy = add_noise(torch.full((2, 1, 4, 4), 0.4), 0.1, seed=3)
    one, four = (
        denoise(
            quadratic, noisy, 0.1, DenoiseOptions(20, 0.005, 1.0, 0.1, num_chains=chains, shifts=False), seed=1
        ).restored
        for chains in (1, 4)
    )
    apart = denoise(
        quadratic, noisy.repeat_interleave(4, 0), 0.1, DenoiseOptions(20, 0.005, 1.0, 0.1), seed=1
    ).restored.unflatten(0, (2, 4))
    torch.testing.assert_close(four, apart.mean(1))
    torch.testing.assert_close(one[0], apart[0, 0])
    assert float(apart.std(1).mean()) > 0.001


def test_chains_of_an_image_see_it_moved_and_are_moved_back() -> None:
    seen: list[Tensor] = []

    def energy(x: Tensor) -> Tensor:  # knows even columns from odd ones
        seen.append(x.detach().clone())
        return 2 * (x[..., ::2] - 0.5).square().sum((1, 2, 3))

    noisy = torch.linspace(-0.9, 0.9, 64).reshape(2, 1, 4, 8)
    options = DenoiseOptions(num_steps=1, step_size=0.1, num_chains=5)
    result = denoise(energy_gradient(energy, engine="autograd"), noisy, 0.1, options)
    starts = torch.stack([noisy.roll(offset, (2, 3)) for offset in [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0)]], 1)
    assert any(torch.equal(x, starts.flatten(0, 1)) for x in seen)
    pulled = 0.6 * noisy + 0.2  # one update of a column that it sees as even
    even = torch.arange(8) % 2 == 0
    three, two = 0.6 * pulled + 0.4 * noisy, 0.4 * pulled + 0.6 * noisy
    torch.testing.assert_close(result.restored, torch.where(even, three, two))


def test_tuned_options_are_better_than_others_that_were_tried(run: CoarseToFineRun, images: Tensor) -> None:
    tuned = tune_denoising(run, images, 0.3, DenoiseOptions(num_steps=3), seed=2)
    noisy = add_noise(images, 0.3, seed=2, first=2**32)
    errors = [
        float((denoise(run, noisy, 0.3, options).restored - images).square().flatten(1).mean(1).log10().mean())
        for options in (tuned, *(DenoiseOptions(3, start_size=start) for start in (None, 4)))
    ]
    assert errors[0] <= min(errors[1:])
    assert tuned.num_steps == 3


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


@pytest.mark.parametrize("name", ["non-local means", "total variation"])
@pytest.mark.parametrize("channels", [1, 3])
def test_classical_denoisers_leave_images_upright(name: str, channels: int) -> None:
    image = torch.full((1, channels, 12, 12), -1.0)
    image[:, :, 2:4] = 1.0
    settings = {"weight": 0.01} if name == "total variation" else {"h": 0.1, "sigma": 0.05, "fast_mode": False}
    assert float((ClassicalDenoiser(name, settings)(image) - image).abs().max()) < 0.2  # type: ignore[arg-type]
