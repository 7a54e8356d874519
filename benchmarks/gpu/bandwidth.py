"""The rate of memory: a copy, and what our operators reach beside it, at 256 MB a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastebm
from benchmarks.gpu.step import BACKENDS, DEVICE, REHEARSAL, Rows, available, times
from fastebm import ops

BYTES = 1 << 16 if REHEARSAL else 1 << 28


def run(rows: Rows) -> None:
    chains = 64
    shape = (chains, BYTES // 4 // chains)
    x, y = (torch.randn(shape, device=DEVICE) for _ in range(2))
    cases: dict[str, Callable[[], Any]] = {"copy": lambda: y.copy_(x)}
    moved = {"copy": 2 * BYTES}
    for backend in BACKENDS:
        # An update reads two tensors and writes one; noise is only written. Both in float32.
        if available(backend, "langevin_step"):
            cases[f"langevin_step {backend}"] = _on(
                backend, lambda: fastebm.langevin_step(x, y, step_size=0.1, noise_std=0.01, seed=0, clamp=(-1, 1))
            )
            moved[f"langevin_step {backend}"] = 3 * BYTES
        if available(backend, "normal"):
            cases[f"normal {backend}"] = _on(backend, lambda: ops.normal(shape, seed=0, device=DEVICE))
            moved[f"normal {backend}"] = BYTES
    found = times(cases)
    rate = {name: moved[name] / seconds[0] for name, seconds in found.items()}
    for name, seconds in found.items():
        rows.add(
            case=name,
            seconds=seconds[0],
            low=seconds[1],
            high=seconds[2],
            bytes=moved[name],
            gigabytes_a_second=rate[name] / 1e9,
            of_a_copys_rate=rate[name] / rate["copy"],
        )


def _on(backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with ops.backend(backend):
            return call()

    return run
