"""A replay buffer's draw and write back, of 64 of 10^5 images, against one update of the chains that it serves.

The buffer should cost 5 % of an update at most: a slowdown of 20 for the row of the update. A chain has many updates,
and the one that is measured is from the midst of a chain, which has read its weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastebm
from benchmarks.harness import nets
from benchmarks.harness.workloads import CAPACITY, NOISE_STD, STEP_SIZE, Workload, buffer_cycle, images, ours
from fastebm.evaluation.speed import Candidate, Plan, Row, compare


def workloads(device: str, full: bool) -> list[Workload]:
    return [Workload("replay_buffer", "CF-EBM", (3, 32, 32), 64, "bfloat16")]


def update(work: Workload) -> Callable[[], object]:
    """One update in the midst of a chain."""
    net = nets.build(work.case, work.shape, work.device)
    sampler = fastebm.Langevin(net, STEP_SIZE, NOISE_STD, clamp=(-1, 1), dtype=work.precision, engine=work.engine)
    state, chain = sampler.init(images(work), seed=0), sampler.gradient.chain()
    chain.__enter__()  # left open, as within `sample`
    return lambda: (chain, sampler.step(state))


def published(work: Workload) -> Callable[[], None]:
    """JEM's buffer: float32, torch's generator, no check of the ends."""
    buffer = torch.rand(CAPACITY, *work.shape, device=work.device) * 2 - 1
    ends = images(work)

    def cycle() -> None:
        slots = torch.randint(0, CAPACITY, (work.batch,), device=work.device)
        kept, new = buffer[slots], torch.rand(work.full_shape, device=work.device) * 2 - 1
        restarted = (torch.rand(work.batch, device=work.device) < 0.05).float()[:, None, None, None]
        restarted * new + (1 - restarted) * kept
        buffer[slots] = ends

    return cycle


def compared(work: Workload, plan: Plan) -> list[Row]:
    others = {
        "one update of the chains": [lambda: Candidate(f"{work.engine}, {work.dtype}", update(work))],
        "the same, stored as float32": [lambda: Candidate("float32", buffer_cycle(work, torch.float32))],
        "JEM's buffer": [lambda: Candidate("float32", published(work))],
    }
    return compare(plan, Candidate("uint8", ours(work)), others, unit="draw and write back")


def test_replay_buffer(measure, work):
    measure(work, compared)
