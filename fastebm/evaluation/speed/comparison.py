"""Compares fastebm with baselines: verifies gradients, finds the fastest variant of each baseline, measures all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from fastebm.compiler.cost_model import Cost
from fastebm.compiler.faults import FaultWarning
from fastebm.compiler.roofline import measured_peak_rates
from fastebm.evaluation.speed.baselines import SkippedError
from fastebm.evaluation.speed.measurement import Case, Summary, interleaved
from fastebm.evaluation.speed.rows import OURS, AchievedRates, Row, dtype_name
from fastebm.ops.uniform import uniform

# The largest accepted distance of a gradient from float64 autograd, relative to its norm: rounding is below, a wrong
# gradient above. With leaky ReLUs float32 can reach 1e-3, where rounding moves a unit to the other side of its kink.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.15}

# Rounds that find the fastest variant of a baseline, before those that are reported.
_TRIALS = 3


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long.

    Attributes:
        suite, case: names for the rows.
        shape: of a sample.
        batch: samples at a time.
        dtype: `torch.float32` or `torch.bfloat16`.
        engine: passed to `energy_gradient`.
        device: "cpu" or "cuda".
        rounds, budget_seconds: see `interleaved`.
        log: called with a line before anything that takes long.
    """

    suite: str
    case: str
    shape: tuple[int, ...]
    batch: int
    dtype: torch.dtype = torch.bfloat16
    engine: str = "auto"
    device: str = "cpu"
    rounds: int = 20
    budget_seconds: float | None = None
    log: Callable[[str], None] = lambda line: None

    def samples(self) -> Tensor:
        """The points where gradients are taken and chains start: uniform in [-0.8, 0.8], within every usual clamp."""
        return 1.6 * uniform((self.batch, *self.shape), seed=0, device=self.device) - 0.8

    def row(self, baseline: str, variant: str, unit: str, **fields: Any) -> Row:
        name = dtype_name(self.dtype)
        return Row(self.suite, self.case, baseline, variant, self.shape, name, self.batch, unit, **fields)


@dataclass(frozen=True)
class Candidate:
    """One way to do the work of a comparison.

    Attributes:
        variant: a name for this way.
        run: does the work once.
        error: the error of its gradients, relative to float64 autograd; None where it takes none.
    """

    variant: str
    run: Case
    error: Callable[[], float] | None = None


Candidates = Sequence[Callable[[], Candidate]]


@dataclass(frozen=True)
class _Selection:
    """The candidate that stands for a baseline, if there is one, its error, and a note on the others."""

    candidate: Candidate | None
    error: float | None
    note: str


def compare(
    plan: Plan,
    ours: Candidate,
    baselines: Mapping[str, Candidates],
    *,
    unit: str,
    units: int = 1,
    fallback: Mapping[str, Callable[[], Candidate]] | None = None,
    cost: Callable[[], Cost | None] = lambda: None,
) -> list[Row]:
    """Measures a comparison. Returns rows, that of fastebm first; a baseline that can't run has the reason as its note.

    Args:
        ours: the candidate by fastebm.
        baselines: the variants of each baseline, made when they are needed. What one raises becomes its note.
        unit, units: what a figure is of, and how many of it one run does.
        fallback: by baseline, what takes its place where none of its variants has right gradients.
        cost: of fastebm's program for one sample and unit; called after it has run.

    Raises ValueError where fastebm's gradients are wrong.
    """
    torch._dynamo.reset()  # what earlier comparisons compiled
    plan.log(f"{plan.suite}: {plan.case}, batch {plan.batch}, {dtype_name(plan.dtype)}")
    error = None if ours.error is None else ours.error()
    if error is not None and not error <= TOLERANCE[plan.dtype]:
        raise ValueError(f"the gradient of {OURS} ({ours.variant}) differs from float64 autograd by {error:.2g}")
    selected = {name: _select(name, variants, (fallback or {}).get(name), plan) for name, variants in baselines.items()}
    cases = {name: found.candidate.run for name, found in selected.items() if found.candidate is not None}
    plan.log("  measuring")
    ours.run()
    times = interleaved(
        {OURS: ours.run, **cases}, plan.rounds, plan.device, budget_seconds=plan.budget_seconds, warm=True
    )
    times = {name: [value / units for value in values] for name, values in times.items()}
    first = plan.row(OURS, ours.variant, unit, gradient_error=error, achieved=_achieved(plan, cost(), times[OURS]))
    rows = [first.with_values(times[OURS], times[OURS])]
    for name, found in selected.items():
        variant = "" if found.candidate is None else found.candidate.variant
        row = plan.row(name, variant, unit, gradient_error=found.error, note=found.note)
        rows.append(row.with_values(times[name], times[OURS]) if name in times else row)
    return rows


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The norm of the difference over that of `truth`; infinity where `found` isn't finite."""
    error = float((found.double() - truth.double()).norm() / truth.double().norm())
    return error if math.isfinite(error) else math.inf


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join([f"{type(error).__name__}:", *lines[:2]])
    return text if len(text) <= 200 else f"{text[:197]}..."


def _achieved(plan: Plan, cost: Cost | None, values: Sequence[float]) -> AchievedRates | None:
    if cost is None:
        return None
    rates = measured_peak_rates(torch.device(plan.device), plan.dtype)
    return AchievedRates.of(cost, plan.batch, Summary.of(values).median, rates)


def _select(name: str, variants: Candidates, fallback: Callable[[], Candidate] | None, plan: Plan) -> _Selection:
    """The fastest of a baseline's variants whose gradients are right."""
    right: list[tuple[Candidate, float | None]] = []
    notes: dict[str, None] = {}
    for make in [*variants, *filter(None, [fallback])]:
        if right and make is fallback:
            break
        plan.log(f"  {name}: preparing a variant")
        try:
            candidate = make()
            error = None if candidate.error is None else candidate.error()
            if error is None or error <= TOLERANCE[plan.dtype]:
                candidate.run()
                right.append((candidate, error))
            else:
                notes[f"{candidate.variant}: wrong gradients, error {error:.2g}, not timed"] = None
        except SkippedError as why:
            notes[f"skipped: {why}"] = None
        except FaultWarning:  # where it is an error, it is none of a baseline
            raise
        except Exception as failure:  # a baseline that can't run is a result
            notes[reason(failure)] = None
    if not right:
        return _Selection(None, None, "; ".join(notes))
    if len(right) == 1:
        return _Selection(*right[0], "; ".join(notes))
    cases = {str(index): candidate.run for index, (candidate, _) in enumerate(right)}
    times = interleaved(cases, _TRIALS, plan.device, warm=True)
    medians = [Summary.of(times[index]).median for index in cases]
    best = min(range(len(right)), key=medians.__getitem__)
    for index, (candidate, _) in enumerate(right):
        if index != best:
            notes[f"{candidate.variant}: {medians[index] / medians[best]:.2f} of its time"] = None
    return _Selection(*right[best], "; ".join(notes))
