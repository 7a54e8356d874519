"""`mclmc_step_` against the same update in eager PyTorch and under `torch.compile`.

The floor is 28 bytes an element over the memory's bandwidth: the sums read gradient and momentum, the update reads
both and the state, and writes state and momentum. Peers sum in float32 and draw torch's own noise.
"""

from __future__ import annotations

import math

import torch

from benchmarks.harness.workloads import Workload, images, noise

# Of two dimensions, where the numbers of a chain are most of the work, of a hundred, and of an image.
SHAPES = {(2,): (10_000, 100_000), (100,): (10_000,), (3, 32, 32): (64, 1024)}


def workloads(device: str, full: bool) -> list[Workload]:
    return [
        Workload("mclmc", case, shape, batch, "float32")
        for shape, batches in SHAPES.items()
        for batch in batches
        for case in ("refresh", "no refresh")
    ]


def turn(u, grad, time):
    """The flow over `time`, and its change of the kinetic energy."""
    freedom = u.shape[1] - 1
    force = grad.norm(dim=1, keepdim=True)
    e, delta = -grad / force, time * force / freedom
    zeta, along = torch.exp(-delta), (-grad / force * u).sum(1, keepdim=True)
    raw = e * (1 - zeta) * (1 + zeta + along * (1 - zeta)) + 2 * zeta * u
    change = freedom * (delta - math.log(2) + torch.log(1 + along + (1 - along) * zeta**2))
    return raw / raw.norm(dim=1, keepdim=True), change[:, 0]


def research(x, u, grad):
    u, closed = turn(u, grad, 0.2)
    u = torch.nn.functional.normalize(u + 0.01 * torch.randn_like(u))
    u, opened = turn(u, grad, 0.2)
    return x + 0.01 * u, u, closed, opened


def research_without_refresh(x, u, grad):
    u, opened = turn(u, grad, 0.6)
    return x + 0.01 * u, u, opened


def test_mclmc(measure, work):
    torch._dynamo.reset()
    x, grad = images(work).flatten(1), noise(work, seed=1).flatten(1)
    u = torch.nn.functional.normalize(noise(work, seed=2).flatten(1))
    update = research_without_refresh if work.case == "no refresh" else research
    compiled = torch.compile(update)
    measure.operator(
        work,
        {"eager, research code": lambda: update(x, u, grad), "torch.compile": lambda: compiled(x, u, grad)},
        bytes_moved=28 * math.prod(work.shape),
    )
