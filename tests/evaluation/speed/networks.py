"""Small energies of the kinds that baselines have to run."""

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

SHAPE = (2, 8, 8)


class Convolutional(nn.Module):
    """Convolutions, one with each kind of spectral norm, and a linear head: (B, 2, 8, 8) to (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv2d(2, 6, 3, padding=1))
        self.second = hooked_spectral_norm(nn.Conv2d(6, 6, 3, stride=2, padding=1))
        self.head = nn.Linear(6 * 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.silu(self.second(nn.functional.silu(self.first(x))))
        return self.head(h.flatten(1)).squeeze(1)


def convolutional() -> Convolutional:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = Convolutional()
        net(torch.randn(2, *SHAPE))  # a power iteration, so that the norms are not those of the start
    return net


def samples(count: int = 3, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
