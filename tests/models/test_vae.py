"""The VAE: shapes, the bound against closed forms, samples that depend on seed and number alone, fused gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fastebm.compiler import energy_gradient
from fastebm.models import VAE, MultiScaleEnergy
from fastebm.models.vae import kl_to_prior, squared_error
from fastebm.models.vae_nets import StridedShortcut
from fastebm.ops.normal import normal


def small(size: int = 8, channels: int = 1, **options: object) -> VAE:
    torch.manual_seed(0)
    return VAE(size, channels, latent=5, width=4, **options).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "channels"), [(4, 1), (8, 1), (16, 2), (32, 3), (64, 3), (128, 1), (256, 3)])
def test_shapes_at_every_size(size: int, channels: int) -> None:
    vae = VAE(size, channels, latent=3, width=2, max_width=8).eval()
    x = torch.rand(2, channels, size, size) * 2 - 1
    mean, log_variance = vae.encode(x)
    assert mean.shape == log_variance.shape == (2, 3)
    images = vae.decode(mean)
    assert images.shape == x.shape
    assert images.abs().max() < 1


def test_widths_double_up_to_a_cap() -> None:
    vae = VAE(32, width=8, max_width=20)
    assert vae.decoder.start.weight.shape[:2] == (128, 40)
    assert [block.conv.weight.shape[:2] for block in vae.decoder.blocks] == [(40, 20), (32, 20), (16, 16)]
    assert VAE(**vae.config).config == pytest.approx(vae.config)


def test_the_bound_is_likelihood_minus_kl() -> None:
    vae = small(variance=0.3)
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        bound = vae.elbo(x, seed=3)
        z, mean, log_variance = vae.posterior(x, seed=3)
        pixels = torch.distributions.Normal(vae.decode(z), math.sqrt(0.3))
        likelihood = pixels.log_prob(x).flatten(1).sum(1)
        prior = torch.distributions.Normal(0.0, 1.0)
        posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        kl = torch.distributions.kl_divergence(posterior, prior).sum(1)
    torch.testing.assert_close(bound.log_likelihood, likelihood, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(bound.kl, kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bound.elbo, likelihood - kl, rtol=1e-4, atol=1e-3)


def test_a_learned_variance_has_its_optimum_at_the_mean_squared_error() -> None:
    vae = small(learned_variance=True)
    error, pixels = torch.tensor([6.4]), 64
    vae.log_variance.data.fill_(math.log(0.1))
    vae.bound(error, torch.zeros(1), pixels).elbo.sum().backward()
    assert float(vae.log_variance.grad) == pytest.approx(0, abs=1e-5)
    assert small().log_variance.requires_grad is False


def test_samples_depend_on_seed_and_number_alone() -> None:
    vae = small()
    whole = vae.sample(10, seed=4)
    torch.testing.assert_close(vae.sample(10, seed=4, batch_size=3), whole)
    torch.testing.assert_close(vae.sample(4, seed=4, first_chain_id=6), whole[6:])
    assert not torch.equal(vae.sample(10, seed=5), whole)
    vae.train()
    torch.testing.assert_close(vae.sample(10, seed=4), whole)
    assert vae.decoder.training


def test_settled_statistics_are_those_of_the_samples() -> None:
    vae = small().train()
    before = {name: value.clone() for name, value in vae.encoder.state_dict().items()}
    vae.update_bn(batches=4, batch_size=64, seed=2)
    seen: list[torch.Tensor] = []
    vae.decoder.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        copy.deepcopy(vae).eval().decode(vae.prior(256, seed=2))
    torch.testing.assert_close(vae.decoder.norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in vae.encoder.state_dict().items())
    assert all(module.training for module in vae.decoder.modules())
    assert vae.decoder.norm.momentum == 0.1


def test_settled_statistics_on_images_are_those_of_posterior_and_prior_side_by_side() -> None:
    vae = small().train()
    images = normal((50, 1, 8, 8), seed=3)
    vae.update_bn(images, batches=3, batch_size=20, seed=2)  # the last 10 are no whole batch
    encoder_mean, decoder_mean = vae.encoder.stem[1].running_mean.clone(), vae.decoder.norm.running_mean.clone()
    seen: list[torch.Tensor] = []
    vae.decoder.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vae.encoder.stem[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        parts = [slice(0, 20), slice(20, 40)]
        draws = [vae.posterior(images[rows], 2, rows.start)[0] for rows in parts]
        vae.decode(torch.cat((*draws, vae.prior(40, 2))))
    stems, start = seen[:2], seen[2]
    torch.testing.assert_close(encoder_mean, torch.cat(stems).mean((0, 2, 3)))
    torch.testing.assert_close(decoder_mean, start.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    few = small()
    few.update_bn(images[:7], batch_size=20)
    assert few.encoder.stem[1].num_batches_tracked == 1


def test_kl_and_squared_error_of_known_values() -> None:
    assert kl_to_prior(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]
    assert float(kl_to_prior(torch.full((1, 1), 2.0), torch.zeros(1, 1))) == 2.0
    assert squared_error(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 12}, "power of two"),
        ({"size": 512}, "power of two"),
        ({"size": 8, "latent": 0}, "latent is 0"),
        ({"size": 8, "variance": 0.0}, "variance is 0"),
    ],
)
def test_what_makes_no_vae_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAE(**options)  # type: ignore[arg-type]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes .batch, 1, 8, 8"):
        small().encode(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"takes .batch, 5"):
        small().decode(torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3)])
def test_an_energy_of_the_decoders_images_runs_on_fused_kernels(size: int, channels: int, dtype: torch.dtype) -> None:
    vae = small(size, channels)
    vae.update_bn(batches=1, batch_size=32)
    energy = nn.Sequential(vae.decoder, MultiScaleEnergy(size, channels, width=4))
    z = vae.prior(4, seed=0)
    gradient = energy_gradient(energy, dtype=dtype, engine="fused")
    energies, slopes = gradient(z)
    assert gradient.batch_invariant
    expected, true = energy_gradient(energy, engine="autograd")(z)
    # In low precision no further off than twice what eager PyTorch loses.
    eager = energy_gradient(energy, dtype=dtype, engine="autograd")(z)[1]
    assert (slopes - true).norm() <= 2 * (eager - true).norm() + 1e-4 * true.norm()
    assert (energies - expected).abs().max() <= (1e-4 if dtype is torch.float32 else 0.05) * (1 + expected.abs().max())


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_strided_shortcut_is_a_strided_convolution(
    monkeypatch: pytest.MonkeyPatch, capability: str, stride: int
) -> None:
    """Also where its pixels are taken first, because PyTorch's own writes out of bounds there."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    shortcut = StridedShortcut(3, 5, stride).double()
    x = torch.randn(4, 3, 7, 8, dtype=torch.float64)
    results = []
    with torch.backends.mkldnn.flags(enabled=False):
        for convolution in (shortcut, lambda h: torch.nn.functional.conv2d(h, shortcut.weight, stride=stride)):
            h = x.clone().requires_grad_()
            y = convolution(h)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (h, shortcut.weight))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
