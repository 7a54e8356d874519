"""The multi-scale energy net of EC-VAE: three branches see an image at full, half and quarter resolution.

Luo et al., "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071, by the settings of the authors' demo:
residual layers of widths (128, 256, 256, 256), two of each, leaky ReLU 0.2, average pools, no norm layers, features of
all branches joined by a linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm.models.layers import normalized
from fastebm.runs.fields import checked_arguments

SLOPE = 0.2
VIEWS = 3
SIZES = (8, 16, 32, 64, 128, 256)


class ResidualLayer(nn.Module):
    """`shortcut(h) + conv3x3(act(conv3x3(act(h))))`, pooled 2x2 where `pool`; a 1x1 shortcut where widths change."""

    def __init__(self, width_in: int, width_out: int, *, pool: bool, spectral_norm: bool):
        super().__init__()
        self.conv1 = normalized(nn.Conv2d(width_in, width_out, 3, padding=1), spectral_norm)
        self.conv2 = normalized(nn.Conv2d(width_out, width_out, 3, padding=1), spectral_norm)
        self.shortcut: nn.Module = nn.Identity()
        if width_in != width_out:
            self.shortcut = normalized(nn.Conv2d(width_in, width_out, 1, bias=False), spectral_norm)
        self.pool = pool

    def forward(self, h: Tensor) -> Tensor:
        main = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(h, SLOPE)), SLOPE))
        h = main + self.shortcut(h)
        return F.avg_pool2d(h, 2) if self.pool else h


class Branch(nn.Module):
    """Two residual layers of each width, the second one pooled, and then a sum over the remaining pixels."""

    def __init__(self, channels: int, widths: tuple[int, ...], spectral_norm: bool):
        super().__init__()
        self.stem = normalized(nn.Conv2d(channels, widths[0], 3, padding=1), spectral_norm)
        layers: list[nn.Module] = []
        for before, width in zip((widths[0], *widths), widths, strict=False):
            layers.append(ResidualLayer(before, width, pool=False, spectral_norm=spectral_norm))
            layers.append(ResidualLayer(width, width, pool=True, spectral_norm=spectral_norm))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.layers(self.stem(x)), SLOPE).sum(dim=(2, 3))


class MultiScaleEnergy(nn.Module):
    """An energy E(x) of images, low where they look real, by three branches at full, half and quarter resolution.

    Spectral norm bounds the gradient of the energy, and with it the length of Langevin steps; its power iterations run
    in train mode only. A branch has fewer pools where its images can't be halved `depth` times.

    Args:
        size: resolution of the square images, a power of two in 8..256.
        channels: number of colour channels of an image.
        width: number of channels of the first two residual layers; later ones have twice as many. 128 in the demo.
        depth: largest number of times that a branch halves its image, with two layers each; 4 in the demo, for 32x32.
        spectral_norm: put spectral norm on every layer.

    Raises ValueError for a size that is no such power of two, and for numbers below 1; TypeError for what are no
    numbers.

        >>> net = MultiScaleEnergy(8, channels=1, width=4)
        >>> net(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2])
    """

    @checked_arguments
    def __init__(self, size: int, channels: int = 3, *, width: int = 128, depth: int = 4, spectral_norm: bool = True):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size is {size}; it must be a power of two in {SIZES[0]}..{SIZES[-1]}")
        for name, value in {"channels": channels, "width": width, "depth": depth}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.size = size
        self.channels = channels
        self.width = width
        self.depth = depth
        self.spectral_norm = spectral_norm
        widths = (width, *(2 * width,) * (depth - 1))
        depths = [min(depth, (size >> view).bit_length() - 1) for view in range(VIEWS)]
        self.branches = nn.ModuleList(Branch(channels, widths[:d], spectral_norm) for d in depths)
        self.head = normalized(nn.Linear(sum(widths[d - 1] for d in depths), 1), spectral_norm)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: `MultiScaleEnergy(**net.config)` has the shape of this net."""
        return {
            "size": self.size,
            "channels": self.channels,
            "width": self.width,
            "depth": self.depth,
            "spectral_norm": self.spectral_norm,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def forward(self, x: Tensor) -> Tensor:
        """The energies (B,) of images x (B, channels, size, size), usually in [-1, 1]."""
        if x.ndim != 4 or x.shape[1:] != (self.channels, self.size, self.size):
            wanted = f"(batch, {self.channels}, {self.size}, {self.size})"
            raise ValueError(f"x has shape {tuple(x.shape)}; this net takes {wanted}")
        features = []
        for view, branch in enumerate(self.branches):
            features.append(branch(F.avg_pool2d(x, 2**view) if view else x))
        return self.head(torch.cat(features, dim=1)).squeeze(1)
