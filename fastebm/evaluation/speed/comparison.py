"""Ours against peers: gradients are verified, of each peer the fastest variant is found, and then all are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from fastebm.compiler.cost_model import Cost
from fastebm.evaluation.speed.baselines import SkippedError
from fastebm.evaluation.speed.measurement import Case, Summary, interleaved
from fastebm.evaluation.speed.roofline import machine_rates
from fastebm.evaluation.speed.rows import OURS, AchievedRates, Row, dtype_name
from fastebm.ops.uniform import uniform

# How far a gradient may be from float64 autograd, relative to its norm: rounding is below, a wrong gradient above. With
# leaky ReLUs float32 can reach 1e-3, where a unit within rounding of its kink takes the other slope.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.15}

# Rounds by which the fastest variant of a peer is found, before the real ones.
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
        say: called with a line before anything that takes long.
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
    say: Callable[[str], None] = lambda line: None

    def samples(self) -> Tensor:
        """Where gradients are taken and chains start: uniform in [-0.8, 0.8], within every usual clamp."""
        return 1.6 * uniform((self.batch, *self.shape), seed=0, device=self.device) - 0.8

    def row(self, baseline: str, variant: str, unit: str, **fields: Any) -> Row:
        name = dtype_name(self.dtype)
        return Row(self.suite, self.case, baseline, variant, self.shape, name, self.batch, unit, **fields)


@dataclass(frozen=True)
class Candidate:
    """One way to do the work of a comparison.

    Attributes:
        variant: how.
        run: does it once.
        error: the error of its gradients, relative to float64 autograd; None where it takes none.
    """

    variant: str
    run: Case
    error: Callable[[], float] | None = None


Candidates = Sequence[Callable[[], Candidate]]


@dataclass(frozen=True)
class _Seeded:
    """What became of a peer: the entrant that stands for it, if any, and what is to be said."""

    entrant: Candidate | None
    error: float | None
    note: str


def compare(
    plan: Plan,
    ours: Candidate,
    baselines: Mapping[str, Candidates],
    *,
    unit: str,
    units: int = 1,
    reserve: Mapping[str, Callable[[], Candidate]] | None = None,
    cost: Callable[[], Cost | None] = lambda: None,
) -> list[Row]:
    """The rows of a comparison, ours first, then the peers, those that could not be measured with the reason.

    Args:
        ours: what is compared with the others.
        baselines: for each peer its variants, made when they are needed. Whatever one raises is its note.
        unit, units: what a figure is of, and how many of it one run does.
        reserve: by peer, what stands in where none of its variants is right.
        cost: of our own program, for one sample and unit, asked for once ours has run.

    Raises ValueError where our own gradients are wrong.
    """
    torch._dynamo.reset()  # what earlier comparisons compiled
    plan.say(f"{plan.suite}: {plan.case}, batch {plan.batch}, {dtype_name(plan.dtype)}")
    error = None if ours.error is None else ours.error()
    if error is not None and not error <= TOLERANCE[plan.dtype]:
        raise ValueError(f"the gradient of {OURS} ({ours.variant}) differs from float64 autograd by {error:.2g}")
    seeded = {name: _seeded(name, variants, (reserve or {}).get(name), plan) for name, variants in baselines.items()}
    cases = {name: baseline.entrant.run for name, baseline in seeded.items() if baseline.entrant is not None}
    plan.say("  measuring")
    ours.run()
    times = interleaved(
        {OURS: ours.run, **cases}, plan.rounds, plan.device, budget_seconds=plan.budget_seconds, warm=True
    )
    times = {name: [value / units for value in values] for name, values in times.items()}
    rows = [plan.row(OURS, ours.variant, unit, gradient_error=error).with_values(times[OURS], times[OURS])]
    rows[0] = replace(rows[0], achieved=_achieved(plan, cost(), times[OURS]))
    for name, baseline in seeded.items():
        variant = "" if baseline.entrant is None else baseline.entrant.variant
        row = plan.row(name, variant, unit, gradient_error=baseline.error, note=baseline.note)
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
    return AchievedRates.of(cost, plan.batch, Summary.of(values).median, machine_rates(plan.device, plan.dtype))


def _seeded(name: str, variants: Candidates, reserve: Callable[[], Candidate] | None, plan: Plan) -> _Seeded:
    """The fastest of a peer's variants whose gradients are right."""
    right: list[tuple[Candidate, float | None]] = []
    notes: dict[str, None] = {}
    for make in [*variants, *filter(None, [reserve])]:
        if right and make is reserve:
            break
        plan.say(f"  {name}: preparing a variant")
        try:
            entrant = make()
            error = None if entrant.error is None else entrant.error()
            if error is None or error <= TOLERANCE[plan.dtype]:
                entrant.run()
                right.append((entrant, error))
            else:
                notes[f"{entrant.variant}: wrong gradients, error {error:.2g}, not timed"] = None
        except SkippedError as why:
            notes[f"skipped: {why}"] = None
        except Exception as failure:  # a peer that can't run is a result
            notes[reason(failure)] = None
    if not right:
        return _Seeded(None, None, "; ".join(notes))
    best, slower = _fastest([entrant for entrant, _ in right], plan)
    notes |= {f"{entrant.variant}: {ratio:.2f} of its time": None for entrant, ratio in slower}
    return _Seeded(best, next(error for entrant, error in right if entrant is best), "; ".join(notes))


def _fastest(entrants: list[Candidate], plan: Plan) -> tuple[Candidate, list[tuple[Candidate, float]]]:
    """The fastest, and the others with their times over its time."""
    if len(entrants) == 1:
        return entrants[0], []
    cases = {str(index): entrant.run for index, entrant in enumerate(entrants)}
    times = interleaved(cases, _TRIALS, plan.device, warm=True)
    medians = [Summary.of(times[str(index)]).median for index in range(len(entrants))]
    best = min(range(len(entrants)), key=medians.__getitem__)
    others = [(entrant, medians[i] / medians[best]) for i, entrant in enumerate(entrants) if i != best]
    return entrants[best], others
