"""Energies as other people write them, for tests: none of these nets knows fastebm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class TutorialNet(nn.Module):
    """Strided convolutions and swish, as tutorials on energy-based models build it for small grey images."""

    def __init__(self, width: int = 8, size: int = 16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 5, stride=2, padding=4),
            Swish(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            Swish(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            Swish(),
            nn.Flatten(),
        )
        features = self.layers(torch.zeros(1, 1, size, size)).shape[1]
        self.head = nn.Sequential(nn.Linear(features, 4 * width), Swish(), nn.Linear(4 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)).squeeze(dim=-1)


class ResidualBlock(nn.Module):
    """Two spectrally normed convolutions beside a 1x1 shortcut, then an average pool."""

    def __init__(self, width_in: int, width_out: int, pool: bool):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.conv1 = norm(nn.Conv2d(width_in, width_out, 3, padding=1))
        self.conv2 = norm(nn.Conv2d(width_out, width_out, 3, padding=1, bias=False))
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.gain = nn.Parameter(torch.full((1, width_out, 1, 1), 0.7))
        self.pool = pool

    def forward(self, h: Tensor) -> Tensor:
        main = self.conv1(F.leaky_relu(h, 0.2))
        main = self.conv2(F.leaky_relu(main, 0.2)) * self.gain
        h = main + self.shortcut(h)
        return F.avg_pool2d(h, 2) if self.pool else h


class ResidualNet(nn.Module):
    """Residual blocks with pools, a sum over all pixels, a linear head: after Du and Mordatch's image models."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, True),
            ResidualBlock(width, 2 * width, True),
            ResidualBlock(2 * width, 2 * width, False),
        )
        self.head = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.blocks(self.stem(x)))
        return self.head(h.sum(dim=[2, 3]))


class WideBlock(nn.Module):
    """Activation, convolution, dropout, activation, convolution, beside a shortcut that may have a stride."""

    def __init__(self, width_in: int, width_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, stride=stride)
        same = width_in == width_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(width_in, width_out, 1, stride=stride)
        self.dropout = nn.Dropout(0.3)

    def forward(self, h: Tensor) -> Tensor:
        main = self.dropout(self.conv1(F.leaky_relu(h, 0.2)))
        return self.conv2(F.leaky_relu(main, 0.2)) + self.shortcut(h)


class WideNet(nn.Module):
    """A wide residual classifier without norms whose energy is minus the log-sum-exp of its logits, as in JEM."""

    def __init__(self, width: int = 4, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(
            WideBlock(width, 2 * width, 1),
            WideBlock(2 * width, 2 * width, 1),
            WideBlock(2 * width, 4 * width, 2),
            WideBlock(4 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.blocks(self.stem(x)), 0.2)
        h = F.adaptive_avg_pool2d(h, 1)
        return -self.head(h.view(h.size(0), -1)).logsumexp(1)


class Decoder(nn.Module):
    """A latent vector to an image: transposed convolution, nearest upsampling, batch norm, GLU, tanh."""

    def __init__(self, latent: int = 6, width: int = 8):
        super().__init__()
        self.start = nn.ConvTranspose2d(latent, 2 * width, 4)
        self.norm1 = nn.BatchNorm2d(2 * width)
        self.grow = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.GLU(1)
        )
        self.last = nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1)
        for norm in (self.norm1, self.grow[2]):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, z: Tensor) -> Tensor:
        h = F.glu(self.norm1(self.start(z[:, :, None, None])), dim=1)
        return torch.tanh(self.last(self.grow(h)))
