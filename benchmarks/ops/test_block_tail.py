"""The block tail against the same in eager PyTorch and under `torch.compile`, on what a CF-EBM block at 32x32 gives it.

The floor is bytes over the memory's bandwidth: 9 values a pooled pixel forward (read 4 of main and of skip, write 1),
and 13 more backward (read the gradient and 4 of main, write 4 of each).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from benchmarks.harness.workloads import Workload, run_tail

SHAPE = (128, 32, 32)


def workloads(device: str, full: bool) -> list[Workload]:
    layouts = ("nchw", "channels-last") if full else ("channels-last",)
    return [
        Workload("block_tail", f"{layout}, {passes}", SHAPE, 64, dtype)
        for dtype in ("float32", "bfloat16")
        for layout in layouts
        for passes in ("forward", "forward and backward")
    ]


def eager(main, skip):
    return (F.silu(F.avg_pool2d(main, 2)) / 1.1 + F.avg_pool2d(skip, 2)) / math.sqrt(2)


def test_block_tail(measure, work):
    torch._dynamo.reset()
    values = 22 if "backward" in work.case else 9
    measure.operator(
        work,
        {"eager": run_tail(eager, work), "torch.compile": run_tail(torch.compile(eager), work)},
        bytes_moved=values * math.prod(SHAPE) // 4 * work.precision.itemsize,
    )
