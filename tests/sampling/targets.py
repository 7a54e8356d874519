"""Targets with known distributions, for tests of samplers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Independent normal numbers of these standard deviations, at temperature 1."""

    scales: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 * (x / x.new_tensor(self.scales)).square().sum(1)

    def draw(self, count: int, seed: int = 0) -> Tensor:
        noise = torch.randn(count, len(self.scales), generator=torch.Generator().manual_seed(seed))
        return noise * torch.tensor(self.scales)


def double_well(x: Tensor) -> Tensor:
    """`(x^2 - 1)^2` in each coordinate."""
    return (x.square() - 1).square().sum(1)


def draw_double_well(count: int, size: int, seed: int = 0) -> Tensor:
    """Exact draws by the inverse of the distribution function, which is tabulated finely."""
    grid = torch.linspace(-3.5, 3.5, 20_001, dtype=torch.float64)
    weight = torch.exp(-((grid**2 - 1) ** 2))
    cumulative = torch.cumsum(weight, 0)
    cumulative = (cumulative - cumulative[0]) / (cumulative[-1] - cumulative[0])
    u = torch.rand(count * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    right = torch.searchsorted(cumulative, u).clamp(1, len(grid) - 1)
    low, high = cumulative[right - 1], cumulative[right]
    t = (u - low) / (high - low).clamp_min(1e-300)
    return (grid[right - 1] + t * (grid[right] - grid[right - 1])).float().reshape(count, size)


def kolmogorov_smirnov(first: Tensor, second: Tensor) -> float:
    """The asymptotic p-value that two samples of one number each come from one distribution (two-sided)."""
    first, second = first.double().sort().values, second.double().sort().values
    both = torch.cat((first, second)).sort().values
    n, m = len(first), len(second)
    distance = float(
        (torch.searchsorted(first, both, right=True) / n - torch.searchsorted(second, both, right=True) / m).abs().max()
    )
    root = math.sqrt(n * m / (n + m))
    z = (root + 0.12 + 0.11 / root) * distance
    terms = sum((-1) ** (k - 1) * math.exp(-2 * k * k * z * z) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * terms))
