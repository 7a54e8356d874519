"""Larger work of ours: chains of 256 images, a cascade, a training iteration, larger images and nets of others."""

from __future__ import annotations

import torch

from benchmarks.gpu.step import DEVICE, REHEARSAL, Rows, times
from benchmarks.harness.workloads import Workload, ours


def run(rows: Rows) -> None:
    size, batch, many = (8, 2, 4) if REHEARSAL else (32, 64, 256)
    works = [
        Workload("chains", "CF-EBM", (3, size, size), many, "bfloat16", num_steps=15),
        Workload("cascade", "CF-EBM", (3, size, size), batch, "bfloat16", num_steps=15),
        Workload("training", "CF-EBM", (3, size, size), batch, "bfloat16", num_steps=15),
        Workload("chains", "CF-EBM", (3, 2 * size, 2 * size), batch, "bfloat16", num_steps=15),
        Workload("chains", "IGEBM-like residual", (3, 32, 32), batch, "bfloat16", num_steps=15),
        Workload("chains", "wide residual 28-2", (3, 32, 32), batch, "bfloat16", num_steps=15),
    ]
    for work in works[: 3 if REHEARSAL else len(works)]:
        with rows.trying(suite=work.suite, work=work.name):
            placed = Workload(**{**work.to_json(), "shape": work.shape, "device": DEVICE})
            found = times({"ours": ours(placed)})["ours"]
            peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
            rows.add(suite=work.suite, work=work.name, seconds=found[0], low=found[1], high=found[2], peak_bytes=peak)
