"""Restoration: what it promises of measurements, noise, seeds and batches, and that it finds what can be found."""

import doctest
import functools
import importlib
import math

import pytest
import torch
from torch import Tensor, nn

import fastebm
from fastebm.tasks.restoration import (
    Colorization,
    CompressedSensing,
    DataConsistency,
    Degradation,
    ImageSearch,
    Inpainting,
    LatentEnergy,
    LatentSearch,
    Refinement,
    SeparableBlur,
    SuperResolution,
    bicubic,
    box_mask,
    compose,
    gaussian_kernel,
    random_mask,
    restore,
    restore_by_cascade,
)

SHAPE = (3, 8, 8)
LATENT = 4
OPERATORS = {
    "small": SuperResolution(2),
    "gray": Colorization(),
    "holes": Inpainting(random_mask(8, 8, 0.5, seed=1)),
    "sensed": CompressedSensing(0.25, 4, seed=2),
    "blurred": SeparableBlur(gaussian_kernel(1.0), 8, 8),
    "gray and small": compose(Colorization(), SuperResolution(2), SHAPE),
    "ragged and small": compose(Inpainting(random_mask(8, 8, 0.5, seed=0)), SuperResolution(2), SHAPE),
}
each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())


class Decoder(nn.Module):
    """A linear decoder with orthonormal columns, so that the truth is known in closed form."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        draws = torch.randn(math.prod(SHAPE), LATENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("columns", torch.linalg.qr(draws).Q.to(dtype))

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.get_buffer("columns").mT).unflatten(1, SHAPE)


class OffSubspace(nn.Module):
    """½ w ‖x - its projection on the decoder's images‖²: an energy that knows real images from others."""

    def __init__(self, decoder: Decoder, weight: float = 100.0):
        super().__init__()
        self.decoder, self.weight = decoder, weight

    def forward(self, x: Tensor) -> Tensor:
        flat, columns = x.flatten(1), self.decoder.get_buffer("columns")
        return 0.5 * self.weight * (flat - flat @ columns @ columns.mT).square().sum(1)


def latents(count: int, *, seed: int = 1) -> Tensor:
    return torch.randn(count, LATENT, generator=torch.Generator().manual_seed(seed))


def nets() -> dict[str, nn.Module]:
    decoder = Decoder()
    return {"decoder": decoder, "energy": OffSubspace(decoder)}


@each_operator
def test_restoration_finds_the_image_that_the_energy_knows(operator: Degradation) -> None:
    z = latents(3)
    truth = Decoder()(z)
    y = operator.A(truth)
    search = LatentSearch(num_steps=150, restarts=2, learning_rate=0.1)
    restored = restore(y, operator, **nets(), latent=LATENT, search=search)
    # The prior pulls z a little towards 0, by 1 / (1 + 100 s²) with s the least part of a latent that y sees.
    assert (restored.images - truth).norm() < 0.35 * (operator.pinv(y) - truth).norm()
    assert restored.residual_rms.max() < 1e-6
    assert restored.starts.shape == (3, 2)
    assert torch.equal(restored.energies, restored.starts.amin(1))


@each_operator
def test_measurements_are_met_to_rounding_whatever_the_decoder_gives(operator: Degradation) -> None:
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    y = operator.A(x)
    restored = restore(y, operator, **nets(), latent=LATENT, search=LatentSearch(num_steps=0, restarts=1))
    assert (operator.A(restored.images) - y).abs().max() < 3e-6
    assert restored.residual_rms.max() < 1e-6
    assert (operator.null(restored.images) - operator.null(Decoder()(restored.latents))).abs().max() < 1e-5


def test_known_pixels_are_the_measured_ones_to_the_last_bit() -> None:
    mask = box_mask(8, 8)
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    refinement = Refinement(5, 0.01, 0.01)
    restored = restore(Inpainting(mask).A(x), Inpainting(mask), **nets(), latent=LATENT, refinement=refinement)
    assert torch.equal(restored.images[..., mask], x[..., mask])


@each_operator
def test_the_gradient_of_the_composed_energy_is_that_of_autograd_and_fused(operator: Degradation) -> None:
    decoder = Decoder(torch.float64)
    search = LatentSearch(energy_weight=0.3, decoder_weight=0.7)
    composition = LatentEnergy(decoder, OffSubspace(decoder), DataConsistency(operator, SHAPE), LATENT, SHAPE, search)
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    base = operator.pinv(operator.A(x))
    z = latents(3).double().requires_grad_()
    image = base + decoder(z) - operator.pinv(operator.A(decoder(z)))
    lacking = base - operator.pinv(operator.A(decoder(z)))
    expected = 0.3 * OffSubspace(decoder)(image) + 0.5 * z.square().sum(1) + 0.35 * lacking.square().sum((1, 2, 3))
    by_hand = torch.autograd.grad(expected.sum(), z)[0]

    gradient = fastebm.energy_gradient(composition, engine="fused")
    energies, whole = gradient(torch.cat((z.detach(), base.flatten(1)), 1))
    torch.testing.assert_close(energies, expected.detach())
    torch.testing.assert_close(whole[:, :LATENT], by_hand)


@each_operator
def test_noisy_measurements_are_met_as_far_as_the_noise_allows(operator: Degradation) -> None:
    noise = 0.05
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1
    consistent = DataConsistency(operator, SHAPE, noise)
    base = operator.pinv(operator.A(x) + noise * torch.randn(operator.A(x).shape, dtype=torch.float64))
    other = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2 - 1
    moved = consistent(other, base)
    torch.testing.assert_close(consistent.residual_rms(moved, base), torch.full((6,), noise, dtype=torch.float64))
    torch.testing.assert_close(operator.null(moved), operator.null(other))
    assert torch.equal(consistent(moved * 1.0, base).round(decimals=9), moved.round(decimals=9))
    near = base + 0.5 * operator.null(other)  # explains y better than the truth would
    assert torch.equal(consistent(near, base), near)


def test_the_allowed_misfit_is_that_of_the_true_image() -> None:
    for operator in OPERATORS.values():
        x = torch.rand(200, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        y = operator.A(x)
        noisy = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        residual_rms = DataConsistency(operator, SHAPE, 0.1).residual_rms(x, operator.pinv(noisy))
        assert residual_rms.square().mean().sqrt().item() == pytest.approx(0.1, rel=0.05)


def test_noise_in_the_search_and_in_the_refinement() -> None:
    operator = SuperResolution(2)
    truth = Decoder()(latents(4))
    y = operator.A(truth) + 0.02 * torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for refinement in (None, Refinement(10, 1e-3, 1e-3)):
        restored = restore(
            y, operator, **nets(), latent=LATENT, noise=0.02, search=LatentSearch(num_steps=60), refinement=refinement
        )
        assert restored.residual_rms.max() <= 0.02 * (1 + 1e-4)


@pytest.mark.parametrize("method", ["adam", "langevin"])
def test_results_are_functions_of_seed_and_chain_and_not_of_batches(method: str) -> None:
    operator = SuperResolution(2)
    y = operator.A(Decoder()(latents(5)))
    search = LatentSearch(method, num_steps=20, restarts=3, step_size=1e-3)  # type: ignore[arg-type]
    options = {**nets(), "latent": LATENT, "search": search, "refinement": Refinement(3, 1e-3, 0.01)}
    whole = restore(y, operator, **options, seed=4)
    torch.testing.assert_close(restore(y, operator, **options, seed=4, batch_size=2).images, whole.images)
    torch.testing.assert_close(restore(y[2:], operator, **options, seed=4, first_chain_id=2).images, whole.images[2:])
    assert not torch.allclose(restore(y, operator, **options, seed=5).images, whole.images, atol=1e-4)


def test_langevin_lowers_the_energy_and_leaves_the_measurement_alone() -> None:
    operator = Colorization()
    y = operator.A(Decoder()(latents(3)))
    options = {**nets(), "latent": LATENT}
    before = restore(y, operator, **options, search=LatentSearch(num_steps=0, restarts=2))
    search = LatentSearch("langevin", num_steps=200, restarts=2, step_size=0.01, noise_std=0.0)
    after = restore(y, operator, **options, search=search)
    assert (after.energies < 0.5 * before.energies).all()
    assert (operator.A(after.images) - y).abs().max() < 1e-6


def test_refinement_lowers_the_energy_of_the_image() -> None:
    operator = SuperResolution(2)
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(3))
    energy = OffSubspace(Decoder())
    options = {**nets(), "latent": LATENT, "search": LatentSearch(num_steps=5)}
    rough = restore(operator.A(x), operator, **options)
    fine = restore(operator.A(x), operator, **options, refinement=Refinement(50, 0.005))
    assert (energy(fine.images) < energy(rough.images)).all()
    assert (operator.A(fine.images) - operator.A(x)).abs().max() < 1e-6
    assert torch.equal(fine.energies, rough.energies)


def test_nets_behind_functions_are_held_in_eval_mode_and_left_as_they_were() -> None:
    decoder = nn.Sequential(Decoder(), nn.BatchNorm2d(3)).train()
    energy = OffSubspace(Decoder())
    y = SuperResolution(2).A(torch.zeros(2, *SHAPE))
    restored = restore(
        y,
        SuperResolution(2),
        decoder=functools.partial(decoder.forward),
        energy=energy.forward,
        latent=LATENT,
        search=LatentSearch(num_steps=2),
    )
    assert restored.residual_rms.max() < 1e-6
    assert decoder.training
    assert decoder[1].running_mean.eq(0).all()


def pulled_to(value: float) -> functools.partial[Tensor]:
    return functools.partial(lambda x, value: 0.5 * (x - value).square().sum((1, 2, 3)), value=value)


@pytest.mark.parametrize("coarse", [None, True, False])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@each_operator
def test_a_cascade_is_held_to_the_measurement(operator: Degradation, noise: float, coarse: bool | None) -> None:
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    y = operator.A(x)
    cascade = fastebm.Cascade({4: pulled_to(0.2), 8: pulled_to(0.2)}, step_size=0.3, num_steps=10, noise_std=0.0)
    restored = restore_by_cascade(
        y,
        operator,
        cascade=cascade,
        restarts=2,
        coarse=coarse,
        noise=noise,
        refinement=Refinement(20, 0.3),
        batch_size=2,
    )
    assert restored.residual_rms.max() <= noise + 1e-5
    consistent = DataConsistency(operator, SHAPE, noise)
    assert consistent.residual_rms(restored.mean, operator.pinv(y)).max() <= noise + 1e-5
    if noise == 0:
        # What is not measured is where the energy pulls it.
        wanted = operator.pinv(y) + operator.null(torch.full_like(x, 0.2))
        assert (restored.images - wanted).abs().max() < 0.01


def test_a_cascade_knows_the_coarse_levels_of_what_it_enlarges() -> None:
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    operator = SuperResolution(4)
    seen: dict[int, Tensor] = {}

    def watched(size: int) -> functools.partial[Tensor]:
        def energy(x: Tensor, size: int) -> Tensor:
            seen[size] = x.detach().clone()
            return x.square().sum((1, 2, 3))

        return functools.partial(energy, size=size)

    cascade = fastebm.Cascade({s: watched(s) for s in (2, 4, 8, 16)}, step_size=0.1, engine="autograd")
    restore_by_cascade(operator.A(x), operator, cascade=cascade, restarts=1)
    for size in (2, 4):  # all is known there
        torch.testing.assert_close(seen[size], nn.functional.avg_pool2d(x, 16 // size))
    torch.testing.assert_close(nn.functional.avg_pool2d(seen[8], 2), operator.A(x))


def test_a_cascade_gives_the_same_for_any_batches() -> None:
    operator = SuperResolution(2)
    y = operator.A(torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3)))
    cascade = fastebm.Cascade({4: pulled_to(0.0), 8: pulled_to(0.1)}, step_size=0.1)
    whole = restore_by_cascade(y, operator, cascade=cascade, seed=3)
    torch.testing.assert_close(
        restore_by_cascade(y, operator, cascade=cascade, seed=3, batch_size=2).images, whole.images
    )
    torch.testing.assert_close(
        restore_by_cascade(y[3:], operator, cascade=cascade, seed=3, first_chain_id=3).images, whole.images[3:]
    )


def flat(x: Tensor) -> Tensor:
    """An energy that leads nowhere."""
    return 0 * x.sum((1, 2, 3))


@pytest.mark.parametrize("noise", [0.0, 0.05])
@each_operator
def test_a_bare_energy_restores_by_chains_at_full_size(operator: Degradation, noise: float) -> None:
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    y = operator.A(x)
    search = ImageSearch(restarts=2, num_steps=20, step_size=0.3, noise_std=0.0)
    options = {"energy": pulled_to(0.2), "search": search, "noise": noise}
    restored = restore(y, operator, **options, seed=1)
    assert restored.residual_rms.max() <= noise + 1e-5
    assert restored.starts.shape == (3, 2)
    assert restored.latents is None
    if noise == 0:
        wanted = operator.pinv(y) + operator.null(torch.full_like(x, 0.2))
        assert (restored.images - wanted).abs().max() < 0.01
    # The chains are those of a cascade with one level.
    noise_std = fastebm.schedules.linear(0.0, 0.0)
    cascade = fastebm.Cascade({8: pulled_to(0.2)}, num_steps=20, step_size=0.3, noise_std=noise_std)
    by_cascade = restore_by_cascade(y, operator, cascade=cascade, restarts=2, coarse=False, noise=noise, seed=1)
    assert torch.equal(restored.images, by_cascade.images)


def test_chains_start_at_full_size_where_coarse_images_know_little() -> None:
    cascade = fastebm.Cascade({8: flat, 16: flat}, step_size=0.1, noise_std=0.0)
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    for operator, coarse in (
        (Inpainting(random_mask(16, 16, 0.5, seed=1)), False),
        (Inpainting(random_mask(16, 16, 0.95, seed=1)), True),
        (Inpainting(box_mask(16, 16)), True),
        (SuperResolution(2), True),
        (SuperResolution(4), True),
        (CompressedSensing(0.5, 8, seed=1), False),
        (SeparableBlur(gaussian_kernel(0.5), 16, 16), False),
    ):
        y = operator.A(x)
        given = {way: restore_by_cascade(y, operator, cascade=cascade, coarse=way).images for way in (True, False)}
        assert torch.equal(restore_by_cascade(y, operator, cascade=cascade).images, given[coarse])
        # Nothing moves them: at full size they are where they start, but for a little noise in what is free.
        initial_estimate = operator.initial_estimate(y)
        assert float((given[False] - initial_estimate).abs().max()) < 0.061
        torch.testing.assert_close(
            initial_estimate, operator.pinv(operator.A(initial_estimate)) + operator.null(initial_estimate)
        )


def test_hidden_pixels_are_guessed_from_those_around() -> None:
    operator = Inpainting(random_mask(8, 8, 0.5, seed=1))
    images = torch.full((2, 3, 8, 8), 0.7)
    y = torch.where(operator.known, images, torch.nan)
    torch.testing.assert_close(operator.initial_estimate(y), images)


def test_the_mean_is_that_of_all_starts() -> None:
    operator = SuperResolution(2)
    y = operator.A(torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)))
    cascade = fastebm.Cascade({4: pulled_to(0.0), 8: pulled_to(0.1)}, step_size=0.1, noise_std=0.1)
    both = restore_by_cascade(y, operator, cascade=cascade, restarts=2, seed=3)
    one = restore_by_cascade(y, operator, cascade=cascade, restarts=1, seed=3)
    torch.testing.assert_close(one.mean, one.images)
    other = 2 * both.mean - both.images
    energies = torch.stack([pulled_to(0.1)(both.images), pulled_to(0.1)(other)], 1)
    torch.testing.assert_close(energies, both.starts.sort(1).values)  # that of the images first: the lowest
    torch.testing.assert_close(both.energies, energies[:, 0])
    assert (energies[:, 0] < energies[:, 1]).all()
    decoder = nn.Sequential(nn.Linear(LATENT, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    search = LatentSearch(num_steps=2, restarts=2)
    found = restore(y, operator, decoder=decoder, energy=pulled_to(0.1), latent=LATENT, search=search)
    alone = restore(
        y, operator, decoder=decoder, energy=pulled_to(0.1), latent=LATENT, search=LatentSearch(num_steps=2, restarts=1)
    )
    torch.testing.assert_close(alone.mean, alone.images)
    assert not torch.equal(found.mean, found.images)
    # What was chosen is what has the lowest energy: of its latents, image and the measurement.
    assert found.latents is not None
    lacking = operator.pinv(y - operator.A(decoder(found.latents)))
    chosen = (
        pulled_to(0.1)(found.images) + 0.5 * found.latents.square().sum(1) + 10 * lacking.square().flatten(1).sum(1)
    )
    torch.testing.assert_close(chosen, found.starts.min(1).values)
    assert (found.starts[:, 0] != found.starts[:, 1]).all()
    torch.testing.assert_close(operator.A(found.mean), y)


def test_bicubic_is_for_super_resolution() -> None:
    y = torch.ones(1, 1, 4, 4)
    enlarged = bicubic(y, SuperResolution(4))
    assert enlarged is not None
    torch.testing.assert_close(enlarged, torch.ones(1, 1, 16, 16))
    assert bicubic(y, Colorization()) is None


def test_wrong_settings_are_refused() -> None:
    y = SuperResolution(2).A(torch.zeros(2, *SHAPE))
    for build, message in (
        (lambda: LatentSearch("newton"), "adam"),  # type: ignore[arg-type]
        (lambda: LatentSearch(restarts=0), "restarts must be at least 1"),
        (lambda: LatentSearch(num_steps=-1), "num_steps must be at least 0"),
        (lambda: LatentSearch(energy_weight=math.nan), "energy_weight must be"),
        (lambda: LatentSearch(learning_rate=0.0), "learning_rate must be positive"),
        (lambda: DataConsistency(SuperResolution(2), SHAPE, -1.0), "must not be negative, got -1"),
        (
            lambda: restore_by_cascade(y, SuperResolution(2), cascade=fastebm.Cascade({4: pulled_to(0.0)})),
            "ends at 4x4, but y measures images of 8x8",
        ),
        (
            lambda: restore_by_cascade(y, SuperResolution(2), cascade=fastebm.Cascade({8: pulled_to(0.0)}), restarts=0),
            "restarts must be at least 1",
        ),
        (lambda: restore(y, SuperResolution(2), energy=flat, latent=4), "come together, got only latent"),
        (
            lambda: restore(y, SuperResolution(2), energy=flat, search=LatentSearch()),
            "without a decoder takes search=ImageSearch, got LatentSearch",
        ),
        (
            lambda: restore(y, SuperResolution(2), **nets(), latent=LATENT, search=ImageSearch()),
            "with a decoder takes search=LatentSearch, got ImageSearch",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_searches_that_diverge_are_an_error() -> None:
    y = SuperResolution(2).A(torch.zeros(2, *SHAPE))
    decoder = Decoder()
    with pytest.raises(FloatingPointError):
        restore(
            y,
            SuperResolution(2),
            decoder=decoder,
            energy=lambda x: x.square().sum((1, 2, 3)) * torch.inf,
            latent=LATENT,
            search=LatentSearch(num_steps=2),
        )


@pytest.mark.parametrize(("module", "count"), [("restore", 9), ("cascade", 7)])
def test_docstring_examples(module: str, count: int) -> None:
    assert doctest.testmod(importlib.import_module(f"fastebm.tasks.restoration.{module}")) == (0, count)
