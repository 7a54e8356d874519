"""The decoder in the form that samples are drawn by: what it gives, and that making it changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastebm.models import VAE
from fastebm.models.frozen_decoder import FrozenDecoder


def trained_like(size: int, channels: int, **options: object) -> VAE:
    """A VAE whose batch norms have statistics, factors and shifts of their own."""
    torch.manual_seed(size)
    vae = VAE(size, channels, latent=6, width=8, max_width=32, **options).eval()  # type: ignore[arg-type]
    for norm in vae.decoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight.data, norm.bias.data, norm.running_mean):
                values.add_(0.3 * torch.randn_like(values))
            norm.running_var.uniform_(0.5, 2)
    return vae


@pytest.mark.parametrize("spectral_norm", [True, False])
@pytest.mark.parametrize(("size", "channels"), [(4, 1), (8, 2), (32, 3)])
def test_it_is_the_decoder_to_rounding(size: int, channels: int, spectral_norm: bool) -> None:
    vae = trained_like(size, channels, spectral_norm=spectral_norm)
    z = vae.prior(16, seed=1)
    twin = copy.deepcopy(vae.decoder).double()
    with torch.no_grad():
        exact = twin(z.double())
        low = copy.deepcopy(vae.decoder).bfloat16()(z.bfloat16())
    frozen = FrozenDecoder(vae.decoder)(z)
    assert frozen.dtype == torch.float32
    assert frozen.is_contiguous()

    def off(images: torch.Tensor) -> float:
        return float((images.double() - exact).norm() / exact.norm())

    assert off(frozen) < 1e-6
    assert off(FrozenDecoder(vae.decoder, torch.bfloat16)(z)) < 2 * off(low)
    torch.testing.assert_close(vae.sample(16, seed=1), frozen, rtol=0, atol=1e-6)


def test_it_is_a_copy_and_making_it_leaves_the_decoder_alone() -> None:
    vae = trained_like(8, 1).train()
    vae.decoder.norm.eval()
    before = copy.deepcopy(vae.state_dict())
    frozen = FrozenDecoder(vae.decoder)
    # A weight with spectral norm that is read in train mode makes another power iteration.
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert (vae.decoder.training, vae.decoder.norm.training, vae.decoder.blocks.training) == (True, False, True)
    z = vae.prior(4, seed=2)
    images = frozen(z)
    for values in (*vae.decoder.parameters(), *vae.decoder.buffers()):
        values.data.zero_()
    assert torch.equal(frozen(z), images)


def test_samples_in_bfloat16_are_near_those_in_float32() -> None:
    vae = trained_like(16, 3)
    exact, low = vae.sample(20, seed=1), vae.sample(20, seed=1, dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    assert 0 < float((low - exact).norm() / exact.norm()) < 0.03
    assert vae.sample(0, seed=1).shape == (0, 3, 16, 16)
    with pytest.raises(ValueError, match=r"float32 or bfloat16, got torch\.float16"):
        vae.sample(2, dtype=torch.float16)
