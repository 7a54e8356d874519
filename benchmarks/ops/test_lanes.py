"""Chains by `run_lane_chain` against the eager research loop: densities, MLPs and an RBM that fastebm did not bring."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastebm
from benchmarks.harness.workloads import Workload
from fastebm.compiler.cost_model import Cost
from fastebm.evaluation.speed import Candidate, Plan, Row, compare

STEP_SIZE, NOISE_STD = 1e-3, 0.01

Energy = Callable[[Tensor], Tensor]


def double_well(x: Tensor) -> Tensor:
    return (x.square() - 1).square().sum(1)


CENTRES = 5 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0))


def mixture(x: Tensor) -> Tensor:
    return -torch.logsumexp(-0.5 * (x[:, None] - CENTRES).square().sum(2), 1)


class RBM(nn.Module):
    def __init__(self, visible: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(hidden, visible))
        self.visible = nn.Parameter(torch.zeros(visible))

    def forward(self, x: Tensor) -> Tensor:
        return -(x @ self.visible) - F.softplus(F.linear(x, self.weight)).sum(1)


def mlp(*sizes: int) -> nn.Module:
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


ENERGIES: dict[str, Callable[[int], Energy]] = {
    "double well": lambda numbers: double_well,
    "mixture": lambda numbers: mixture,
    "MLP of 2 x 64": lambda numbers: mlp(numbers, 64, 64, 1),
    "MLP of 512": lambda numbers: mlp(numbers, 512, 1),
    "RBM of 500": lambda numbers: RBM(numbers, 500),
}


def workloads(device: str, full: bool) -> list[Workload]:
    cases = [("double well", 2, 1000), ("double well", 20, 1000), ("MLP of 2 x 64", 2, 1000), ("MLP of 512", 784, 64)]
    if full:
        cases += [("double well", numbers, batch) for numbers in (2, 20) for batch in (10_000, 100_000)]
        cases += [("mixture", 2, 1000), ("mixture", 2, 100_000)]
        cases += [(case, 784, batch) for case in ("MLP of 512", "RBM of 500") for batch in (1, 16, 256)]
    return [Workload("lanes", case, (numbers,), batch, "float32", num_steps=100) for case, numbers, batch in cases]


def test_lanes(measure, work):
    if measure.base is not None:
        pytest.skip("energies like these are no part of the suites, which another revision is measured by")
    if work.device != "cpu":
        pytest.skip("lane programs run on the CPU")
    torch.manual_seed(0)
    energy = ENERGIES[work.case](*work.shape)
    if isinstance(energy, nn.Module):
        energy.requires_grad_(False)
    sampler = fastebm.Langevin(energy, STEP_SIZE, NOISE_STD, engine=work.engine)
    start = torch.rand(work.full_shape)

    def eager() -> Tensor:
        x = start
        for _ in range(work.num_steps):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(energy(x).sum(), x)
            x = x.detach() - STEP_SIZE * gradient + NOISE_STD * torch.randn_like(x)
        return x

    def compared(work: Workload, plan: Plan) -> list[Row]:
        ours = Candidate("", lambda: sampler.sample(start, work.num_steps, seed=0))
        return compare(plan, ours, {"eager, research code": [lambda: Candidate("", eager)]}, unit="chain",
                       cost=lambda: Cost(0, 0))  # fmt: skip

    measure(work, compared)
