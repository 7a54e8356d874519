"""The peak memory of one energy gradient of CF-EBM at 256x256: ours against autograd with frozen weights.

Every figure comes from a fresh process (see `peak_memory`), because memory of an earlier gradient would distort it.
"""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.harness.peak_memory import in_fresh_process
from benchmarks.harness.workloads import Workload
from fastebm.evaluation.speed import Plan, Row
from fastebm.evaluation.speed.baselines import TUNED
from fastebm.evaluation.speed.rows import OURS

ROUNDS = 3
OF_WEIGHTS = "update_memory"


def workloads(device: str, full: bool) -> list[Workload]:
    batches = (1, 4, 16) if full else (4,)
    dtypes = ("bfloat16", "float32") if full or device == "cpu" else ("bfloat16",)
    return [Workload("memory", "CF-EBM", (3, 256, 256), batch, dtype) for batch in batches for dtype in dtypes]


def peak(work: Workload, implementation: str) -> float:
    of = "weights" if work.suite == OF_WEIGHTS else "x"
    question = json.dumps({**work.to_json(), "implementation": implementation, "of": of})
    return float(in_fresh_process("benchmarks.harness.peak_memory", question)["bytes"])


def compared(work: Workload, plan: Plan) -> list[Row]:
    ours = [peak(work, "fastebm") for _ in range(min(ROUNDS, plan.rounds))]
    autograd = [peak(work, "autograd") for _ in ours]
    variant = "autograd under autocast" if work.suite == OF_WEIGHTS else f"autograd, {work.dtype} weights, frozen"
    rows = {
        OURS: plan.row(OURS, f"{work.engine}, {work.dtype}", "gradient", quantity="bytes"),
        TUNED: plan.row(TUNED, variant, "gradient", quantity="bytes"),
    }
    return [rows[OURS].with_values(ours, ours), rows[TUNED].with_values(autograd, ours)]


def test_memory(request, measure, work):
    if measure.base is not None:
        pytest.skip("memory is compared with autograd only")
    if work.device == "cpu" and not sys.platform.startswith("linux"):
        pytest.skip("the peak of resident memory can be reset on Linux only")
    measure(work, compared)
