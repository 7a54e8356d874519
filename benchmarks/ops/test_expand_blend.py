"""The Expand blend against eager PyTorch and `torch.compile`. The floor is 3 values an element (read 2, write 1)."""

from __future__ import annotations

import math

import torch

from benchmarks.harness.workloads import Workload, noise

SHAPE = (128, 16, 16)


def workloads(device: str, full: bool) -> list[Workload]:
    return [Workload("expand_blend", "scalar beta", SHAPE, 64, dtype) for dtype in ("float32", "bfloat16")]


def eager(primal, fade, beta):
    return beta * primal + (1 - beta) * fade


def test_expand_blend(measure, work):
    torch._dynamo.reset()
    primal, fade = noise(work, seed=0), noise(work, seed=1)
    # A beta of no dimensions leaves the dtype alone, as a number does.
    beta = torch.full((), 0.3, device=work.device, dtype=work.precision)
    compiled = torch.compile(eager)
    measure.operator(
        work,
        {
            "eager": lambda: eager(primal, fade, beta),
            "torch.lerp": lambda: torch.lerp(fade, primal, beta),
            "torch.compile": lambda: compiled(primal, fade, beta),
        },
        bytes_moved=3 * math.prod(SHAPE) * work.precision.itemsize,
    )
