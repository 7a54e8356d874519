"""The energies that are measured: fastebm's own nets, and nets of other kinds as people build them in plain PyTorch.

Weights are untrained and from a fixed seed; the time of a gradient does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from fastebm.models import CoarseToFineEnergy, MultiScaleEnergy


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Tutorial(nn.Module):
    """The net of the UvA deep-learning tutorial on energy-based models, for digits (B, 1, 28, 28)."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 5, stride=2, padding=4),
            Swish(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            Swish(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            Swish(),
            nn.Conv2d(4 * width, 4 * width, 3, stride=2, padding=1),
            Swish(),
            nn.Flatten(),
            nn.Linear(4 * width * 2 * 2, 4 * width),
            Swish(),
            nn.Linear(4 * width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(-1)


class NormedBlock(nn.Module):
    """Two spectrally normed 3x3 convolutions beside a 1x1 shortcut, and a 2x2 average pool where `pool`."""

    def __init__(self, width_in: int, width_out: int, pool: bool):
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(width_in, width_out, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(width_out, width_out, 3, padding=1))
        plain = width_in == width_out
        self.shortcut = nn.Identity() if plain else spectral_norm(nn.Conv2d(width_in, width_out, 1, bias=False))
        self.pool = pool

    def forward(self, h: Tensor) -> Tensor:
        main = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(h, 0.2)), 0.2))
        h = main + self.shortcut(h)
        return F.avg_pool2d(h, 2) if self.pool else h


class ResidualNet(nn.Module):
    """Residual blocks as in IGEBM (Du and Mordatch, 2019) for (B, 3, 32, 32): pools, a sum over pixels, linear."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(
            NormedBlock(width, width, True),
            NormedBlock(width, width, False),
            NormedBlock(width, 2 * width, True),
            NormedBlock(2 * width, 2 * width, False),
            NormedBlock(2 * width, 2 * width, True),
            NormedBlock(2 * width, 2 * width, False),
        )
        self.head = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.blocks(self.stem(x)), 0.2)
        return self.head(h.sum(dim=(2, 3))).squeeze(1)


class WideBlock(nn.Module):
    """Activation and 3x3 convolution twice beside a shortcut, which is a 1x1 convolution where shapes change."""

    def __init__(self, width_in: int, width_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, stride=stride)
        plain = width_in == width_out and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Conv2d(width_in, width_out, 1, stride=stride)

    def forward(self, h: Tensor) -> Tensor:
        main = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(h, 0.2)), 0.2))
        return main + self.shortcut(h)


class WideResidual(nn.Module):
    """WRN-`depth`-`widen` without norms on (B, 3, 32, 32), whose energy is minus the log-sum-exp of its logits (JEM).

    Grathwohl et al., "Your classifier is secretly an energy based model", 2020, use 28 and 10.
    """

    def __init__(self, depth: int = 28, widen: int = 2, classes: int = 10):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"the depth of a wide residual net is 6n + 4 with n at least 1, got {depth}")
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for before, width, stride in zip(widths, widths[1:], (1, 2, 2), strict=False):
            blocks.append(WideBlock(before, width, stride))
            blocks += [WideBlock(width, width, 1) for _ in range((depth - 4) // 6 - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.blocks(self.stem(x)), 0.2)
        return -self.head(h.mean(dim=(2, 3))).logsumexp(dim=1)


NETS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    "CF-EBM": lambda shape: CoarseToFineEnergy(shape[-1], shape[0], base_width=32),
    "EC-VAE multi-scale": lambda shape: MultiScaleEnergy(shape[-1], shape[0]),
    "UvA tutorial": lambda shape: Tutorial(),
    "IGEBM-like residual": lambda shape: ResidualNet(),
    "wide residual 28-2": lambda shape: WideResidual(28, 2),
    "wide residual 28-10": lambda shape: WideResidual(28, 10),
}


def build(name: str, shape: tuple[int, ...], device: str) -> nn.Module:
    """The net `name` for samples of `shape`, in eval mode on `device`, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NETS[name](shape)
    return net.to(device).eval()
