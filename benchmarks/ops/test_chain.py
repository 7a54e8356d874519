"""`run_chain`, 16 updates in a call, against the same updates one by one: the cascade's small stages, bfloat16."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import nets
from benchmarks.harness.workloads import NOISE_STD, STEP_SIZE, Workload, images
from fastebm import rng
from fastebm.compiler import energy_gradient
from fastebm.compiler.cost_model import Cost
from fastebm.evaluation.speed import Candidate, Plan, Row, compare
from fastebm.ops import CALL_STEPS, advance_chain


def workloads(device: str, full: bool) -> list[Workload]:
    sizes, batches = ((8, 16, 32), (1, 16, 64)) if full else ((8, 16), (16,))
    return [
        Workload("chain", "CF-EBM", (3, size, size), batch, "bfloat16", num_steps=CALL_STEPS)
        for size in sizes
        for batch in batches
    ]


def test_chain(measure, work):
    if measure.base is not None:
        pytest.skip("whole chains in a call are no part of the public face, which another revision is measured by")
    gradient = energy_gradient(nets.build(work.case, work.shape, work.device), dtype=work.precision, engine="fused")
    x = images(work)
    schedule = torch.tensor([[STEP_SIZE, NOISE_STD]], device=x.device)
    rest = (rng.make_chain_ids(0, work.batch, x.device), -1.0, 1.0, *(None,) * 8, 0.0)

    def start() -> tuple[torch.Tensor, torch.Tensor]:
        return x.clone(), rng.make_key(1, 0, device=x.device)

    with torch.no_grad(), gradient.chain():
        gradient(x)
        program = gradient.compiled_program(x)
        assert program is not None

        def in_one() -> torch.Tensor:
            state, key = start()
            advance_chain(state, program, work.num_steps, schedule, key, *rest)
            return state

        def one_by_one() -> torch.Tensor:
            state, key = start()
            one = torch.arange(3, device=key.device).clamp_(max=1)
            for _ in range(work.num_steps):
                torch.ops.fastebm.langevin_step_(state, gradient(state)[1], schedule, key, *rest)
                key.add_(one)
            return state

        def compared(work: Workload, plan: Plan) -> list[Row]:
            baselines = {"one by one": [lambda: Candidate("", one_by_one)]}
            return compare(plan, Candidate("", in_one), baselines, unit="call", cost=lambda: Cost(0, 0))

        measure(work, compared)
