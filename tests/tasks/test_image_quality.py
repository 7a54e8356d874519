"""PSNR and SSIM, against their definitions; PSNR also against torchmetrics."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
import torchmetrics.functional.image as metrics
from torch import Tensor

from fastebm.tasks import psnr, quality


def pair(channels: int, side: int, count: int = 3) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(side)
    truth = torch.rand(count, channels, side, side, generator=draws) * 2 - 1
    return (truth + 0.3 * torch.randn(truth.shape, generator=draws)).clamp(-1, 1), truth


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32)])
def test_psnr(channels: int, side: int) -> None:
    images, truth = pair(channels, side)
    found = quality(images, truth).psnr
    expected = 10 * torch.log10(4 / (images.double() - truth.double()).square().mean((1, 2, 3)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    others = metrics.peak_signal_noise_ratio(
        images.double(), truth.double(), data_range=2.0, dim=(1, 2, 3), reduction="none"
    )
    torch.testing.assert_close(found, others, rtol=0, atol=1e-6)


def by_hand(images: Tensor, truth: Tensor) -> Tensor:
    """The formula of Wang et al. 2004 over the Gaussian windows of 11x11 that lie within the image."""
    at = torch.arange(-5, 6, dtype=torch.float64)
    line = (-at.square() / (2 * 1.5**2)).exp()
    window = (torch.outer(line, line) / line.sum() ** 2)[None, None]

    def local(x: Tensor) -> Tensor:
        return F.conv2d(x.flatten(0, 1).unsqueeze(1), window)

    x, y = images.double(), truth.double()
    mean_x, mean_y = local(x), local(y)
    spread = local(x * x) - mean_x**2 + local(y * y) - mean_y**2
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    map_ = (2 * mean_x * mean_y + c1) * (2 * (local(x * y) - mean_x * mean_y) + c2)
    map_ = map_ / ((mean_x**2 + mean_y**2 + c1) * (spread + c2))
    return map_.unflatten(0, x.shape[:2]).flatten(1).mean(1)


@pytest.mark.parametrize(("channels", "side"), [(1, 11), (1, 28), (3, 32)])
def test_ssim(channels: int, side: int) -> None:
    images, truth = pair(channels, side)
    found = quality(images, truth).ssim
    torch.testing.assert_close(found, by_hand(images, truth), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [4, 7, 8, 10])
def test_images_smaller_than_a_window(side: int) -> None:
    images, truth = pair(1, side)
    assert (quality(images, truth).ssim < 0.99).all()
    same = quality(truth, truth)
    torch.testing.assert_close(same.ssim, torch.ones(3, dtype=torch.float64))
    assert same.to_json()["psnr"] == math.inf


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 4x4"):
        quality(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8))
    with pytest.raises(ValueError, match="as the truth"):
        quality(torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_psnr_needs_no_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    images, truth = pair(1, 8)
    found = quality(images, truth).psnr
    for name in ("skimage", "skimage.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    assert torch.equal(psnr(images, truth), found)
    with pytest.raises(ModuleNotFoundError, match="SSIM and the classical denoisers need scikit-image"):
        quality(images, truth)
