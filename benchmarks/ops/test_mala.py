"""The Metropolis test of Langevin proposals, half of which are accepted, against eager PyTorch and `torch.compile`.

The floor is 16 bytes an element over the memory's bandwidth (read both states and gradients), and 16 more where a chain
is accepted.
"""

from __future__ import annotations

import math

import torch

from benchmarks.harness.workloads import Workload, mala_states

STEP_SIZE, NOISE_STD = 0.1, 0.05
SHAPE = (3, 32, 32)
# Images in 64 MB.
MANY = 16 * 2**20 // 3072


def workloads(device: str, full: bool) -> list[Workload]:
    found = [Workload("mala", "step", SHAPE, batch, "float32") for batch in (64, MANY)]
    return found + [Workload("mala", "step", (2,), batch, "float32") for batch in (1000, 100_000)]


def eager(x, energy, grad, proposal, proposal_energy, proposal_grad):
    """The test with the two proposal densities, as research code has it."""
    there = (proposal - x + STEP_SIZE * grad).flatten(1).square().sum(1)
    back = (x - proposal + STEP_SIZE * proposal_grad).flatten(1).square().sum(1)
    temperature = NOISE_STD**2 / (2 * STEP_SIZE)
    log_ratio = (energy - proposal_energy) / temperature + (there - back) / (2 * NOISE_STD**2)
    accepted = torch.rand_like(energy).log() < log_ratio
    chosen = accepted.reshape(-1, *(1,) * (x.dim() - 1))
    return (
        torch.where(chosen, proposal, x),
        torch.where(accepted, proposal_energy, energy),
        torch.where(chosen, proposal_grad, grad),
    )


def test_mala(measure, work):
    torch._dynamo.reset()
    states, compiled = mala_states(work), torch.compile(eager)
    others = {"eager": lambda: eager(*states), "torch.compile": lambda: compiled(*states)}
    measure.operator(work, others, bytes_moved=24 * math.prod(work.shape))
