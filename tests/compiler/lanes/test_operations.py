"""Lane programs of energies of every kind: energies and gradients against float64 autograd."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastebm import ops
from fastebm.compiler.lanes import LaneExecutor, lower, trace

from .energies import ENERGIES

TOLERANCE = 1e-5
# Where float32 autograd itself is further from float64, it is the measure.
OF_EAGER = 2.0
# Matrices of numbers this large are so ill-conditioned that the order of additions decides.
SCALES = {"inverse": (1.0, 1e-3), "solve": (1.0, 1e-3, 10.0)}


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not ops.backends.runs_compiled("run_lanes"):
        pytest.skip("lane programs run on the compiled backend alone")


def one_by_one(energy: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    energies, gradients = [], []
    for sample in x.split(1):
        leaf = sample.clone().requires_grad_()
        value = energy(leaf)
        energies.append(value.detach().reshape(1))
        gradients.append(torch.autograd.grad(value.sum(), leaf)[0])
    return torch.cat(energies), torch.cat(gradients)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


@pytest.mark.parametrize(("name", "shape", "energy"), ENERGIES, ids=[name for name, _, _ in ENERGIES])
def test_energies_and_gradients_agree_with_float64(name: str, shape: tuple[int, ...], energy: Any) -> None:
    module: nn.Module | None = None
    reference = energy
    if not inspect.signature(energy).parameters:
        energy = module = energy()
        reference = copy.deepcopy(energy).double()
    generator = torch.Generator().manual_seed(1)
    executor = LaneExecutor(lower(trace(energy, module, torch.randn(1, *shape, generator=generator))), module)
    executor.refresh()
    compared = 0
    for scale in SCALES.get(name, (1.0, 1e-3, 10.0, 100.0)):
        x = scale * torch.randn(4, *shape, generator=generator)
        expected, eager = one_by_one(reference, x.double()), one_by_one(energy, x)
        finite = torch.ones(len(x), dtype=torch.bool)
        for part in (*expected, *eager):
            finite &= part.isfinite().flatten(1).all(1) if part.ndim > 1 else part.isfinite()
        if not finite.any():
            continue
        compared += 1
        for what, mine, truth, theirs in zip(("energy", "gradient"), executor(x), expected, eager, strict=True):
            bound = max(TOLERANCE, OF_EAGER * error(theirs[finite], truth[finite]))
            assert error(mine[finite], truth[finite]) <= bound, f"{what} at scale {scale}"
    assert compared > 1


def test_names_are_unique() -> None:
    names = [name for name, _, _ in ENERGIES]
    assert len(set(names)) == len(names)
