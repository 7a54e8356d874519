"""A BAOAB or leapfrog step that closes and opens, and the kinetic energy, against eager PyTorch and `torch.compile`.

The floor is 20 bytes an element over the memory's bandwidth for a step (read x, velocity and gradient, write x and
velocity) and 4 for the energy; on a CPU, drawing the noise of BAOAB costs as much as the rest.
"""

from __future__ import annotations

import math

import torch

from benchmarks.harness.workloads import Workload, images, noise

STEP_SIZE, DECAY, NOISE_STD = 0.01, 0.9, 0.05
SHAPE = (3, 32, 32)
# Images in 64 MB.
MANY = 16 * 2**20 // 3072


def workloads(device: str, full: bool) -> list[Workload]:
    cases = ("BAOAB", "leapfrog", "kinetic energy")
    found = [Workload("underdamped", case, SHAPE, batch, "float32") for batch in (64, MANY) for case in cases]
    return found + [Workload("underdamped", "BAOAB", (2,), batch, "float32") for batch in (1000, 100_000)]


def baoab(x, velocity, grad):
    velocity = velocity - STEP_SIZE * grad
    x = x + STEP_SIZE / 2 * velocity
    velocity = DECAY * velocity + NOISE_STD * torch.randn_like(velocity)
    return x + STEP_SIZE / 2 * velocity, velocity


def leapfrog(x, velocity, grad):
    velocity = velocity - STEP_SIZE * grad
    return x + STEP_SIZE * velocity, velocity


def kinetic_energy(x, velocity, grad):
    return velocity.flatten(1).double().square().sum(1) / 2


def in_place(step):
    """The step as research code writes it with operators in place."""
    if step is baoab:

        def run(x, velocity, grad):
            velocity.add_(grad, alpha=-STEP_SIZE)
            x.add_(velocity, alpha=STEP_SIZE / 2)
            velocity.mul_(DECAY).add_(torch.randn_like(velocity), alpha=NOISE_STD)
            x.add_(velocity, alpha=STEP_SIZE / 2)

    else:

        def run(x, velocity, grad):
            velocity.add_(grad, alpha=-STEP_SIZE)
            x.add_(velocity, alpha=STEP_SIZE)

    return run


def test_underdamped(measure, work):
    torch._dynamo.reset()
    step = {"BAOAB": baoab, "leapfrog": leapfrog, "kinetic energy": kinetic_energy}[work.case]
    x, velocity, grad = images(work), noise(work, seed=1), noise(work, seed=2)
    compiled = torch.compile(step)
    others = {"eager": lambda: step(x, velocity, grad), "torch.compile": lambda: compiled(x, velocity, grad)}
    if step is not kinetic_energy:
        placed = in_place(step)
        others["eager, in place"] = lambda: placed(x, velocity, grad)
    measure.operator(work, others, bytes_moved=(4 if step is kinetic_energy else 20) * math.prod(work.shape))
