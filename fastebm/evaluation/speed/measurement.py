"""Interleaved measurement: all cases of a comparison run in one process, in rounds, so that their ratios are reliable.

The speed of a shared machine drifts, so times of two cases are comparable within one round only. A round runs every
case once, in a new random order; the reported ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Case = Callable[[], Any]
Clock = Callable[[], float]

# Fewer rounds give no useful quantiles, however long a round takes.
MINIMUM_ROUNDS = 3


@dataclass(frozen=True)
class Summary:
    """The median of a case's figures, and their 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """The summary of one figure or more; quantiles are interpolated between neighbours, never beyond the ends."""
        if not values:
            raise ValueError("a summary needs at least one figure")
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        median = statistics.median(values)
        return cls(median, min(median, fifths[0]), max(median, fifths[-1]))  # interpolation rounds


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Each round's figure over that of `base` in the same round. Raises ValueError where there are not as many."""
    if len(values) != len(base):
        raise ValueError(f"ratios are taken round by round: {len(values)} rounds on {len(base)}")
    return [value / other for value, other in zip(values, base, strict=True)]


def seconds(case: Case, repeats: int, device: str, clock: Clock | None = None) -> float:
    """The mean time of `repeats` calls one after the other, until the device has done them; see `interleaved`."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            case()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    clock = clock or time.perf_counter
    start = clock()
    for _ in range(repeats):
        case()
    return (clock() - start) / repeats


def interleaved(
    cases: Mapping[str, Case],
    rounds: int,
    device: str,
    *,
    slice_seconds: float = 0.02,
    budget_seconds: float | None = None,
    warm: bool = False,
    clock: Clock | None = None,
) -> dict[str, list[float]]:
    """The seconds of each case in each round.

    Args:
        cases: what to run, by name.
        rounds: how many, at least 1.
        device: "cpu" or "cuda".
        slice_seconds: a case is repeated within a round until about this much time has passed.
        budget_seconds: where the rounds would take longer than this, there are fewer, but not fewer than 3.
        warm: whether each case has been run before; else it is run once first, which compiles and allocates.
        clock: seconds on the CPU, by default of the wall. `time.process_time` is for one thread beside other work.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    repeats, round_seconds = {}, 0.0
    for name, case in cases.items():
        if not warm:
            case()
        each = _one_call(case, device, slice_seconds, clock)
        repeats[name] = max(1, min(1000, int(slice_seconds / each)))
        round_seconds += repeats[name] * each
    if budget_seconds is not None:
        affordable = int(budget_seconds / max(round_seconds, 1e-9))
        rounds = min(rounds, max(MINIMUM_ROUNDS, affordable))
    times: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(seconds(cases[name], repeats[name], device, clock))
    return times


def _one_call(case: Case, device: str, slice_seconds: float, clock: Clock | None) -> float:
    """An estimate of the time of one call: of one where that is long, of the fastest of four else."""
    each = max(1e-7, seconds(case, 1, device, clock))
    if each > slice_seconds:
        return each
    return min(each, *(max(1e-7, seconds(case, 1, device, clock)) for _ in range(3)))
