"""What all steps share: the device, sizes, times and rows."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import benchmarks.faults  # noqa: F401
from fastebm import ops
from fastebm.evaluation.speed.measurement import interleaved

REHEARSAL = os.environ.get("FASTEBM_REHEARSAL", "0") not in ("", "0")
DEVICE = "cpu" if REHEARSAL else "cuda"
T = TypeVar("T", Tensor, nn.Module)
ROUNDS = 3 if REHEARSAL else 25
# Of the kernels that are written twice.
BACKENDS = ("cuda", "triton")


class Rows:
    """The rows of one step, written as they come."""

    def __init__(self, out: Path, step: str) -> None:
        self.path = out / "rows" / f"{step}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self.failed = 0

    def add(self, ok: bool | None = None, **row: Any) -> None:
        """A row of facts or numbers; with `ok` one of a check, whose failures make the step fail at its end."""
        if ok is not None:
            row["ok"] = ok
            self.failed += not ok
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print("  ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)

    def runs_here(self, backend: str) -> bool:
        """Whether a backend can run; else a row that says why, which fails on a GPU."""
        reason = ops.backends.unavailable_reason(backend, DEVICE)
        if reason is not None:
            self.add(**{"ok": False} if not REHEARSAL else {}, backend=backend, skipped=reason)
        return reason is None

    @contextmanager
    def trying(self, **row: Any) -> Iterator[None]:
        """An error in the block is a row, and the step goes on."""
        try:
            yield
        except Exception as error:
            self.add(ok=False, **row, error=f"{type(error).__name__}: {str(error).strip()[:500]}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers in [-1, 1] on the device, the same on every backend."""
    generator = torch.Generator().manual_seed(seed)
    return on_device(torch.rand(shape, generator=generator) * 2 - 1)


def on_device(what: T) -> T:
    """Moved to the GPU; in a rehearsal as it is, because what is sent to the CPU counts as the host's own there."""
    return what if REHEARSAL else what.to(DEVICE)


def times(cases: Mapping[str, Callable[[], Any]], seconds: float = 3.0) -> dict[str, tuple[float, float, float]]:
    """(median, 20 % and 80 % quantile) of the seconds that each case takes, measured in turns."""
    found = interleaved(cases, ROUNDS, DEVICE, budget_seconds=seconds, slice_seconds=0.001 if REHEARSAL else 0.02)
    return {name: (statistics.median(values), *_fifths(values)) for name, values in found.items()}


def _fifths(values: list[float]) -> tuple[float, float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], fifths[-1]


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a graph of one call, after three that warm up; the call itself in a rehearsal."""
    if REHEARSAL:
        run()
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def available(backend: str, kernel: str) -> bool:
    """Whether a backend has a kernel and can run here."""
    return backend in ops.schemas.KERNELS[kernel].backends and ops.backends.unavailable_reason(backend, DEVICE) is None
