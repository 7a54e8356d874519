"""One update of a chain: replayed, launched one by one, and what a chain costs before its first update."""

from __future__ import annotations

import torch

import fastebm
from benchmarks.gpu.replay import without_graphs
from benchmarks.gpu.step import DEVICE, REHEARSAL, Rows, times, uniform
from benchmarks.harness import nets
from benchmarks.harness.workloads import NOISE_STD, STEP_SIZE

SIZES = ((8, 2),) if REHEARSAL else ((8, 64), (16, 64), (32, 64))
STEPS = 4 if REHEARSAL else 64


def run(rows: Rows) -> None:
    for size, batch in SIZES:
        with rows.trying(size=size, batch=batch):
            measured(rows, size, batch)


def measured(rows: Rows, size: int, batch: int) -> None:
    net = nets.build("CF-EBM", (3, size, size), DEVICE)
    sampler = fastebm.Langevin(net, STEP_SIZE, NOISE_STD, clamp=(-1, 1), dtype=torch.bfloat16, engine="fused")
    x = uniform(batch, 3, size, size, seed=0)
    gradient = fastebm.energy_gradient(net, dtype=torch.bfloat16, engine="fused")
    parameter = next(net.parameters())

    def chain(steps: int, graphs: bool) -> None:
        if graphs:
            sampler.sample(x, steps, seed=0, check=False)
        else:
            with without_graphs():
                sampler.sample(x, steps, seed=0, check=False)

    def start(changed: bool) -> None:
        if changed:
            with torch.no_grad():
                parameter.add_(1e-9)
        with gradient.chain():
            gradient(x)

    found = times(
        {
            "replayed": lambda: chain(2 * STEPS, True),
            "replayed, half as many": lambda: chain(STEPS, True),
            "launched": lambda: chain(2 * STEPS, False),
            "launched, half as many": lambda: chain(STEPS, False),
            "chain of one gradient": lambda: start(False),
            "chain of one gradient, new weights": lambda: start(True),
        }
    )
    for name in ("replayed", "launched"):
        each = (found[name][0] - found[f"{name}, half as many"][0]) / STEPS
        rows.add(
            size=size,
            batch=batch,
            case=name,
            seconds_an_update=each,
            seconds_of_the_rest=found[name][0] - 2 * STEPS * each,
        )
    for name in ("chain of one gradient", "chain of one gradient, new weights"):
        rows.add(size=size, batch=batch, case=name, seconds=found[name][0], low=found[name][1], high=found[name][2])
