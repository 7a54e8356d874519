"""Langevin chains of CF-EBM from 8x8 to 128x128: the time of a whole chain over the number of its updates.

A chain has 15 updates, as the authors run at each resolution, and fewer where one update takes seconds.
"""

from __future__ import annotations

from benchmarks.harness import nets
from benchmarks.harness.workloads import NOISE_STD, STEP_SIZE, Workload
from fastebm.evaluation.speed import Plan, Row, Updates, compare_chains


def workloads(device: str, full: bool) -> list[Workload]:
    def work(size: int, batch: int, dtype: str) -> Workload:
        num_steps = 15 if size <= 32 or device == "cuda" else 5
        return Workload("chains", "CF-EBM", (3, size, size), batch, dtype, num_steps)

    if full:
        dtypes = ("bfloat16", "float32")
        sizes = (8, 16, 32, 64, 128)
        return [work(size, batch, dtype) for size in sizes for batch in (1, 16, 64, 256) for dtype in dtypes]
    if device == "cuda":
        return [work(size, 64, "bfloat16") for size in (8, 32, 64)]
    return [work(size, 4 if size == 128 else 64, "bfloat16") for size in (8, 16, 32, 64, 128)]


def compared(work: Workload, plan: Plan) -> list[Row]:
    updates = Updates.constant(work.num_steps, STEP_SIZE, NOISE_STD)
    return compare_chains(nets.build(work.case, work.shape, work.device), plan, updates)


def test_chains(measure, work):
    measure(work, compared)
