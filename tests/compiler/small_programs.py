"""Programs of a few operations for tests, and what they are compared with: plain PyTorch in float64."""

import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.executor import AtenExecutor
from fastebm.compiler.lazy_tensors import LazyTensor
from fastebm.compiler.operations import Input, Linear, Operation, Reshape
from fastebm.compiler.program import INPUT, Builder, Program

TOLERANCE = 1e-10


def tensor(*shape: int, seed: int = 0) -> Tensor:
    """Fixed normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(x: Tensor | None) -> LazyTensor | None:
    """A tensor as a weight of a program."""
    return None if x is None else LazyTensor(lambda: x, (), tuple(x.shape))


class Small(Builder):
    """A program under construction, with the samples as its first result."""

    def __init__(self, *sample: int):
        super().__init__()
        self.add_exact(Input(sample), name=INPUT)

    def then(self, operation: Operation, *inputs: str) -> str:
        """Add an operation on these results, or on the last one."""
        return self.add(operation, *(inputs or (self.nodes[-1].name,)), name=type(operation).__name__.lower())

    def features(self) -> Program:
        """The program whose output is the last result."""
        return Program(tuple(self.nodes), (self.nodes[-1].name,))

    def energy(self) -> Program:
        """The program whose output is `energy_of` the last result."""
        whole = Builder(self.nodes)
        length = math.prod(self.nodes[-1].shape)
        flat = whole.add(Reshape((length,)), self.nodes[-1].name, name="flat")
        summed = whole.add(Linear(value(_functional(length))), flat, name="linear")
        energy = whole.add(Reshape(()), summed, name="energy")
        return Program(tuple(whole.nodes), (energy,))


def energy_of(features: Tensor) -> Tensor:
    """A fixed linear functional of features, so that every one of them has a gradient of its own."""
    flat = features.flatten(1)
    return (flat * _functional(flat.shape[1])).sum(1)


@functools.cache
def _functional(length: int) -> Tensor:
    return tensor(1, length, seed=99)


def run(program: Program, x: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The outputs of a program."""
    executor = AtenExecutor(program, dtype)
    executor.refresh()
    return executor(x)


def by_autograd(energy: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and their gradient as PyTorch has them."""
    x = x.clone().requires_grad_()
    energies = energy(x)
    return energies.detach().flatten(), torch.autograd.grad(energies.sum(), x)[0]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal shapes, and a largest difference small against the largest number."""
    assert found.shape == expected.shape
    if expected.numel():
        size = expected.abs().max().clamp(min=1e-300)
        assert (found - expected).abs().max() <= tolerance * size


def assert_computes(programs: Iterable[Program], features: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Every program gives the energies and gradients of `energy_of(features(x))`. Returns how many there were."""
    expected = by_autograd(lambda x: energy_of(features(x)), x)
    count = 0
    for program in programs:
        for found, wanted in zip(run(differentiate(program), x), expected, strict=True):
            assert_close(found, wanted)
        count += 1
    return count
