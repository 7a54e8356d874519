"""Which of several ways to run an energy is the fastest on the states at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["Timing", "measured"]

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


def measured(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """The median seconds of each, measured in turns after a first round that doesn't count."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + BUDGET
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for run, spent in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            spent.append(time.perf_counter() - begin)
    return [median(spent) for spent in times]
