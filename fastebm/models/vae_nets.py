"""The two nets of the VAE: a decoder of latent vectors to images, and an encoder of images to their posterior.

Their shape is that of the demo of EC-VAE (Luo et al., "Energy-Calibrated VAE with Test Time Free Lunch", arXiv
2311.04071). The decoder is a transposed convolution to 4x4 and then, for each doubling of the resolution, nearest
upsampling, a convolution with spectral norm, batch norm and a gated linear unit, with tanh at its end. The encoder is a
small residual net. Widths, the linear layer on the encoder's 4x4 map and all sizes but 32x32 are our own choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm.models.layers import normalized

LOWEST = 4
SIZES = (4, 8, 16, 32, 64, 128, 256)
# Beyond this bound the posterior is as wide as e**10 priors, or has no width.
LOG_VARIANCE_BOUND = 10.0


class GatedUpBlock(nn.Module):
    """Twice the resolution: nearest upsampling, conv3x3, batch norm, gated linear unit."""

    def __init__(self, width_in: int, width_out: int, spectral_norm: bool):
        super().__init__()
        # Without a bias, which batch norm would subtract again.
        self.conv = nn.Conv2d(width_in, 2 * width_out, 3, padding=1, bias=False)
        normalized(self.conv, spectral_norm)
        self.norm = nn.BatchNorm2d(2 * width_out)

    def forward(self, h: Tensor) -> Tensor:
        """h (B, width_in, s, s) to (B, width_out, 2s, 2s)."""
        h = F.interpolate(h, scale_factor=2, mode="nearest")
        return F.glu(self.norm(self.conv(h)), dim=1)


class Decoder(nn.Module):
    """Latent vectors (B, latent) to images (B, channels, size, size) in (-1, 1)."""

    def __init__(self, size: int, channels: int, latent: int, width: int, max_width: int, spectral_norm: bool):
        super().__init__()
        widths = _widths(size, width, max_width)
        self.start = nn.ConvTranspose2d(latent, 2 * widths[LOWEST], LOWEST, bias=False)
        self.norm = nn.BatchNorm2d(2 * widths[LOWEST])
        self.blocks = nn.Sequential(
            *(GatedUpBlock(widths[s], widths[2 * s], spectral_norm) for s in widths if 2 * s in widths)
        )
        self.to_image = nn.Conv2d(widths[size], channels, 3, padding=1)

    def doublings(self) -> Iterator[GatedUpBlock]:
        """The blocks that double the resolution, from 4x4 up."""
        for block in self.blocks:
            assert isinstance(block, GatedUpBlock)
            yield block

    def forward(self, z: Tensor) -> Tensor:
        h = F.glu(self.norm(self.start(z[:, :, None, None])), dim=1)
        return torch.tanh(self.to_image(self.blocks(h)))


class StridedShortcut(nn.Conv2d):
    """A 1x1 convolution of every `stride`-th pixel, without a bias.

    On CPUs with AVX2 alone these pixels are taken first: there oneDNN's strided one (PyTorch 2.13) writes beyond its
    weights' gradient where channels are few, and the process aborts some time later.
    """

    def __init__(self, width_in: int, width_out: int, stride: int):
        super().__init__(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or torch.backends.cpu.get_cpu_capability() != "AVX2":
            return super().forward(x)
        down, across = self.stride
        return F.conv2d(x[..., ::down, ::across], self.weight)


class ResidualDownBlock(nn.Module):
    """Half the resolution: two conv3x3 with batch norm, the first with stride 2, beside a strided 1x1 shortcut."""

    def __init__(self, width_in: int, width_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(StridedShortcut(width_in, width_out, stride), nn.BatchNorm2d(width_out))

    def forward(self, h: Tensor) -> Tensor:
        main = F.leaky_relu(self.norm1(self.conv1(h)), 0.2)
        return F.leaky_relu(self.norm2(self.conv2(main)) + self.shortcut(h), 0.2)


class Encoder(nn.Module):
    """Images (B, channels, size, size) to mean and log-variance of the posterior, (B, latent) each.

    A residual net with two blocks at each resolution down to 4x4, as in ResNet-18, and a linear layer on the 4x4 map.
    """

    def __init__(self, size: int, channels: int, latent: int, width: int, max_width: int):
        super().__init__()
        widths = _widths(size, width, max_width)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[size], 3, padding=1, bias=False), nn.BatchNorm2d(widths[size]), nn.LeakyReLU(0.2)
        )
        blocks: list[nn.Module] = [
            ResidualDownBlock(widths[size], widths[size], 1),
            ResidualDownBlock(widths[size], widths[size], 1),
        ]
        for s in sorted(widths, reverse=True)[1:]:
            blocks += [ResidualDownBlock(widths[2 * s], widths[s], 2), ResidualDownBlock(widths[s], widths[s], 1)]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(widths[LOWEST] * LOWEST**2, 2 * latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.linear(self.blocks(self.stem(x)).flatten(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)


def _widths(size: int, width: int, max_width: int) -> dict[int, int]:
    """The number of channels by resolution, from 4 to `size`."""
    return {s: min(max_width, width * (size // s)) for s in SIZES if s <= size}
