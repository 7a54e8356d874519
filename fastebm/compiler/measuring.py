"""Which of several ways to run an energy is the fastest on the states at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastebm.compiler.candidates import Executor
from fastebm.compiler.device_graphs import capture, graphs_wanted, warm_up
from fastebm.compiler.executor import CompiledExecutor

__all__ = ["Timing", "as_in_a_chain", "measured"]

# Rounds in which every candidate runs once, and the seconds after which no further one begins.
MAX_ROUNDS, MIN_ROUNDS, BUDGET = 50, 3, 0.2


@dataclass(frozen=True)
class Timing:
    """One way to run an energy.

    Attributes:
        name: "lane program", "fused program", "PyTorch operations", "autograd" or "torch.compile".
        seconds: the median time of energies and gradient of the batch; None where it can't run.
        batch_invariant: whether a sample gets the same bits in any batch.
        chosen: whether chains run so.
        refused: why it can't run, or "".
    """

    name: str
    seconds: float | None
    batch_invariant: bool
    chosen: bool = False
    refused: str = ""


def as_in_a_chain(executor: Executor, x: Tensor) -> Callable[[], Any]:
    """What runs a program on x as chains do: on a GPU fused programs are replayed, others launch kernel by kernel."""

    def run() -> Any:
        return executor(x)

    if not (isinstance(executor, CompiledExecutor) and x.is_cuda and graphs_wanted()):
        return run
    with torch.cuda.device(x.device):
        warm_up(run)
        try:
            graph, kept = capture(run)
        except Exception:  # a chain goes on without, and says why
            return run

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def measured(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """The median seconds of each on a device, measured in turns after a first round that doesn't count."""
    for run in runs:
        _finished(run, device)
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + BUDGET
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for run, spent in zip(runs, times, strict=True):
            begin = time.perf_counter()
            _finished(run, device)
            spent.append(time.perf_counter() - begin)
    return [median(spent) for spent in times]


def _finished(run: Callable[[], Any], device: torch.device) -> None:
    """Runs, and waits for what a GPU was asked to do."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
