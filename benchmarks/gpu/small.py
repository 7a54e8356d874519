"""One small net and a call of operators, for compute-sanitizer, under which everything takes many times as long."""

from __future__ import annotations

import torch

import fastebm
from benchmarks.gpu.step import BACKENDS, DEVICE, Rows, uniform
from fastebm import ops
from fastebm.models import CoarseToFineEnergy


def run(rows: Rows) -> None:
    torch.manual_seed(0)
    net = CoarseToFineEnergy(8, base_width=8).to(DEVICE)
    x = uniform(3, 3, 8, 8, seed=0)
    for dtype in (torch.float32, torch.bfloat16):
        energies, gradient = fastebm.energy_gradient(net, dtype=dtype, engine="fused")(x)
        found = fastebm.weight_gradient(net, dtype=dtype, engine="fused")(x, torch.ones_like(energies))[1]
        finite = all(bool(each.isfinite().all()) for each in (energies, gradient, *found.values()))
        rows.add(ok=finite, net="CF-EBM 8x8", dtype=str(dtype))
    for backend in BACKENDS:
        if rows.runs_here(backend):
            with ops.backend(backend):
                moved = fastebm.langevin_step(x, x, step_size=0.1, noise_std=0.1, seed=1)
                noise = fastebm.ops.normal((3, 1001), seed=0, device=DEVICE)
            rows.add(ok=bool(moved.isfinite().all() and noise.isfinite().all()), backend=backend)
