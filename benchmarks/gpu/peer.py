"""Our chain at 32x32, then the same by tuned eager PyTorch and by torch.compile under a graph of our own."""

from __future__ import annotations

from functools import partial

import torch

import fastebm
from benchmarks.gpu.programs import by_autograd, error
from benchmarks.gpu.step import DEVICE, REHEARSAL, Rows, times, uniform
from benchmarks.harness import nets
from benchmarks.harness.workloads import NOISE_STD, STEP_SIZE
from fastebm.evaluation.speed import Updates
from fastebm.evaluation.speed.baselines import SkippedError, torch_compile_chain, tuned_eager
from fastebm.evaluation.speed.eager import eager_twin

SIZE, BATCH, STEPS = (8, 2, 2) if REHEARSAL else (32, 64, 15)


def run(rows: Rows) -> None:
    net = nets.build("CF-EBM", (3, SIZE, SIZE), DEVICE)
    x = uniform(BATCH, 3, SIZE, SIZE, seed=0)
    sampler = fastebm.Langevin(net, STEP_SIZE, NOISE_STD, clamp=(-1, 1), dtype=torch.bfloat16, engine="fused")

    def ours() -> None:
        sampler.sample(x, STEPS, seed=0, check=False)

    # Alone first: the row is there if the peer's compilation takes too long.
    alone = times({"fastebm": ours})["fastebm"]
    median, low, high = (seconds / STEPS for seconds in alone)
    rows.add(case="fastebm", batch=BATCH, size=SIZE, seconds_an_update=median, low=low, high=high)
    expected = by_autograd(net, x[:3])[0]
    twin, updates = eager_twin(net), Updates.constant(STEPS, STEP_SIZE, NOISE_STD)
    peers = {
        "eager, tuned": partial(tuned_eager, twin, torch.bfloat16),
        "torch.compile": partial(
            torch_compile_chain, twin, torch.bfloat16, DEVICE, "inside", (-1.0, 1.0), capture=not REHEARSAL
        ),
    }
    for name, make in peers.items():
        with rows.trying(case=name):
            try:
                peer = make()
            except SkippedError as skipped:
                rows.add(case=name, skipped=str(skipped))
                continue
            found = times({"fastebm": ours, name: lambda peer=peer: peer.chain(x, updates)})
            gradient_error = error(peer.gradient(x)[1][:3], expected)
            rows.add(
                case=name,
                variant=peer.variant,
                gradient_error=gradient_error,
                seconds_an_update=found[name][0] / STEPS,
                fastebm_beside_it=found["fastebm"][0] / STEPS,
                slowdown=found[name][0] / found["fastebm"][0],
            )
