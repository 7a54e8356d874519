"""The machine, and that our operators run compiled on it: a fallback would make every later number one of PyTorch's."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from benchmarks.gpu.step import BACKENDS, DEVICE, Rows
from fastebm import ops
from fastebm.evaluation.speed import machine_facts


def run(rows: Rows) -> None:
    rows.add(**machine_facts(DEVICE))
    of_kit = Path(os.environ.get("KIT") or "", "commit")
    if os.environ.get("KIT") and of_kit.is_file():  # the only one that is known where there is no repository
        rows.add(commit_of_kit=of_kit.read_text().strip())
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        rows.add(
            multiprocessors=properties.multi_processor_count,
            bytes_in_all=properties.total_memory,
            bytes_of_l2=getattr(properties, "L2_cache_size", None),
            architectures_of_torch=torch.cuda.get_arch_list(),
        )
    for name in BACKENDS:
        if rows.runs_here(name):
            rows.add(ok=True, backend=name)
    for kernel, entry in ops.schemas.KERNELS.items():
        wanted = [name for name in BACKENDS if name in entry.backends]
        if DEVICE == "cuda" and wanted:
            chosen = ops.backends.select_backend(DEVICE, kernel=kernel)
            rows.add(ok=chosen in wanted, kernel=kernel, chosen=chosen)
