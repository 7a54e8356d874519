"""Denoising against closed forms, with the same result for any batch split; classical denoisers."""

import pytest
import torch
from torch import Tensor

from fastebm import energy_gradient
from fastebm.tasks import ClassicalDenoiser, DenoiseOptions, add_noise, denoise, tune_denoising
from fastebm.training import CoarseToFineRun

MEAN, STD = 0.3, 0.2


def quadratic(x: Tensor) -> Tensor:
    return (x - MEAN).square().sum((1, 2, 3)) / (2 * STD**2)


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


@pytest.mark.parametrize("name", ["non-local means", "total variation"])
@pytest.mark.parametrize("channels", [1, 3])
def test_classical_denoisers_leave_images_upright(name: str, channels: int) -> None:
    image = torch.full((1, channels, 12, 12), -1.0)
    image[:, :, 2:4] = 1.0
    settings = {"weight": 0.01} if name == "total variation" else {"h": 0.1, "sigma": 0.05, "fast_mode": False}
    assert float((ClassicalDenoiser(name, settings)(image) - image).abs().max()) < 0.2  # type: ignore[arg-type]
