"""One energy of the gallery: how it is made, where its chains start, and which batches are measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

import benchmarks.faults  # noqa: F401
from fastebm import EnergyGradient

Energy = Callable[[Tensor], Tensor]
Start = Callable[[tuple[int, ...], Generator, float], Tensor]
"""States within an energy's domain: of a shape (B, ...), from a generator, as far out as a scale says."""


def normal(shape: tuple[int, ...], generator: Generator, scale: float) -> Tensor:
    """Normal states of standard deviation `scale`."""
    return scale * torch.randn(shape, generator=generator)


def unit(shape: tuple[int, ...], generator: Generator, scale: float) -> Tensor:
    """Uniform states in the middle of [0, 1]: within 0.45 `scale` of 0.5, with `scale` at most 1."""
    return 0.5 + 0.9 * min(scale, 1.0) * (torch.rand(shape, generator=generator) - 0.5)


def image(shape: tuple[int, ...], generator: Generator, scale: float) -> Tensor:
    """Uniform states in [-`scale`, `scale`]."""
    return scale * (2 * torch.rand(shape, generator=generator) - 1)


# Batches that are measured. A density in a few dimensions is sampled by many chains, images by few.
OF_DENSITIES = (1, 64, 1000, 100_000)
OF_VECTORS = (1, 16, 64, 1000)
OF_IMAGES = (1, 16, 64)


@dataclass(frozen=True)
class Entry:
    """An energy as somebody hands it over.

    Attributes:
        name: of the energy, unique in the gallery.
        kind: of energies: "density", "posterior", "physics", "dense", "convolution", "attention" or "structure".
        source: the paper or the authors, and what is taken from them. All code here is our own.
        build: makes the energy, a module in eval mode or a function; random weights come from torch's generator.
        shape: of a sample.
        batches: the numbers of chains that are measured.
        step_size: of unadjusted Langevin dynamics; the noise's standard deviation is `sqrt(2 * step_size)`.
        states: draws states in the energy's domain.
        scales: how far out `states` are when gradients are verified.
        clamp: the bounds of a domain that the chains must not leave, or None.
    """

    name: str
    kind: str
    source: str
    build: Callable[[], Energy]
    shape: tuple[int, ...]
    batches: tuple[int, ...] = OF_VECTORS
    step_size: float = 1e-3
    states: Start = normal
    scales: tuple[float, ...] = (0.1, 1.0, 3.0)
    clamp: tuple[float, float] | None = None

    @property
    def noise_std(self) -> float:
        return math.sqrt(2 * self.step_size)

    def make(self) -> Energy:
        """The energy, always with the same weights; modules are in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            energy = self.build()
        return energy.eval() if isinstance(energy, nn.Module) else energy

    def start(self, batch: int, generator: Generator, scale: float = 1.0) -> Tensor:
        """States (batch, *shape), float32, in the energy's domain."""
        return self.states((batch, *self.shape), generator, scale)


def in_float64(energy: Energy) -> Energy:
    """The energy that gives the true gradient at float64 states: a module's copy in float64, or a function as it is.

    Functions of the gallery compute in the dtype of their states, and so do modules that other callables keep.
    """
    exact = copy.deepcopy(energy)
    module = exact if isinstance(exact, nn.Module) else getattr(exact, "func", None)
    if isinstance(module, nn.Module):
        module.double()
    return exact


def true_gradient(energy: Energy, x: Tensor) -> Tensor:
    """The gradient of the sum of the energies at x, in float64."""
    x = x.detach().double().requires_grad_(True)
    with torch.enable_grad():
        return torch.autograd.grad(in_float64(energy)(x).sum(), x)[0]


def engine_of(gradient: EnergyGradient) -> str:
    """What ran the last samples: "lanes", "fused" (image kernels), "stock" (PyTorch's operations) or "autograd"."""
    if gradient.engine == "autograd":
        return "autograd"
    described = gradient.describe()
    if "lane program" in described:
        return "lanes"
    return "stock" if "runs on PyTorch operations" in described else "fused"
