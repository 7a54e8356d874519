"""Chains of MALA, underdamped dynamics and HMC by `run_lane_sampler` against eager loops of the same samplers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastebm
from benchmarks.harness.workloads import Workload
from benchmarks.ops.test_lanes import double_well, mixture
from fastebm.compiler.cost_model import Cost
from fastebm.evaluation.speed import Candidate, Plan, Row, compare
from fastebm.sampling.sampler import Sampler

STEP, FRICTION, LEAPFROGS = 0.05, 1.0, 5

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "MALA": lambda energy, **o: fastebm.MALA(energy, STEP, **o),
    "BAOAB": lambda energy, **o: fastebm.Underdamped(energy, STEP, FRICTION, **o),
    "HMC": lambda energy, **o: fastebm.HMC(energy, STEP, LEAPFROGS, **o),
}


def workloads(device: str, full: bool) -> list[Workload]:
    batches = (1000, 100_000) if full else (1000,)
    return [
        Workload("lane_samplers", case, (numbers,), batch, "float32", num_steps=50)
        for case in SAMPLERS
        for numbers in (2, 20)
        for batch in batches
    ]


def evaluated(energy: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    energies = energy(x)
    return energies.detach(), torch.autograd.grad(energies.sum(), x)[0]


def eager_mala(energy: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    e, g = evaluated(energy, x)
    for _ in range(steps):
        y = x - STEP * g + (2 * STEP) ** 0.5 * torch.randn_like(x)
        f, h = evaluated(energy, y)
        back, forth = (x - y + STEP * h).square().sum(1), (y - x + STEP * g).square().sum(1)
        accepted = torch.rand_like(e).log() < e - f + (forth - back) / (4 * STEP)
        e = torch.where(accepted, f, e)
        x, g = (torch.where(accepted[:, None], new, old) for new, old in ((y, x), (h, g)))
    return x


def eager_baoab(energy: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    v, g = torch.randn_like(x), evaluated(energy, x)[1]
    decay = torch.exp(torch.tensor(-FRICTION * STEP))
    for _ in range(steps):
        v = v - STEP / 2 * g
        x = x + STEP / 2 * v
        v = decay * v + (1 - decay**2).sqrt() * torch.randn_like(v)
        x = x + STEP / 2 * v
        g = evaluated(energy, x)[1]
        v = v - STEP / 2 * g
    return x


def eager_hmc(energy: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    e, g = evaluated(energy, x)
    for _ in range(steps):
        v = torch.randn_like(x)
        y, f, h = x, e, g
        before = v.square().sum(1) / 2
        for _ in range(LEAPFROGS):
            v = v - STEP / 2 * h
            y = y + STEP * v
            f, h = evaluated(energy, y)
            v = v - STEP / 2 * h
        accepted = torch.rand_like(e).log() < e - f + before - v.square().sum(1) / 2
        e = torch.where(accepted, f, e)
        x, g = (torch.where(accepted[:, None], new, old) for new, old in ((y, x), (h, g)))
    return x


EAGER = {"MALA": eager_mala, "BAOAB": eager_baoab, "HMC": eager_hmc}


def test_lane_samplers(measure, work):
    if measure.base is not None:
        pytest.skip("energies like these are no part of the suites, which another revision is measured by")
    if work.device != "cpu":
        pytest.skip("lane programs run on the CPU")
    energy = mixture if work.shape == (2,) else double_well
    sampler = SAMPLERS[work.case](energy, engine=work.engine)
    start = torch.rand(work.full_shape)

    def compared(work: Workload, plan: Plan) -> list[Row]:
        ours = Candidate("", lambda: sampler.sample(start, work.num_steps, seed=0))
        eager = Candidate("", lambda: EAGER[work.case](energy, start, work.num_steps))
        return compare(plan, ours, {"eager, research code": [lambda: eager]}, unit="chain", cost=lambda: Cost(0, 0))

    measure(work, compared)
