"""`fastebm.ops.uniform` against torch's generators. The floor is 4 bytes an element, written."""

from __future__ import annotations

import math

import torch

from benchmarks.harness.workloads import Workload

SHAPE = (3, 32, 32)


def workloads(device: str, full: bool) -> list[Workload]:
    return [Workload("uniform", "float32", SHAPE, batch, "float32") for batch in (64, 16 * 2**20 // 3072)]


def test_uniform(measure, work):
    torch._dynamo.reset()
    compiled = torch.compile(lambda: torch.rand(work.full_shape, device=work.device))
    measure.operator(
        work,
        {"torch.rand": lambda: torch.rand(work.full_shape, device=work.device), "torch.compile of rand": compiled},
        bytes_moved=4 * math.prod(SHAPE),
    )
