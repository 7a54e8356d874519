"""Schedules of step size and noise (`fastebm.schedules`): functions from the time `t` of a chain, in [0, 1], to values.

A schedule takes a float64 tensor of times and returns a tensor of values of the same shape. `constant`, `linear`,
`polynomial`, `cosine` and `piecewise_constant` make schedules; any callable of that form is one too, and a plain number
means `constant(number)`. Update `k` of `K` has the time `t = k / (K - 1)`, so that the first update has the start value
and the last one the end value.

>>> import torch, fastebm
>>> fastebm.schedules.linear(0.3, 0.1)(torch.tensor([0.0, 0.5, 1.0]))
tensor([0.3000, 0.2000, 0.1000])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from fastebm.scalars import as_int, as_real, shown

Schedule = Callable[[Tensor], Tensor]


def _finite(**values: float) -> list[float]:
    """The values as floats. Raises TypeError or ValueError for what is no finite number."""
    numbers = [as_real(name, value) for name, value in values.items()]
    for name, value in zip(values, numbers, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"a schedule needs finite numbers, got {name}={value}")
    return numbers


@dataclass(frozen=True)
class Constant:
    """The same value at all times. Build it with `constant`."""

    value: float

    def __call__(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.value)

    def __repr__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True)
class Polynomial:
    """`end + (start - end) * (1 - t)**power`. Build it with `polynomial` or `linear`."""

    start: float
    end: float
    power: float

    def __call__(self, t: Tensor) -> Tensor:
        # The convex combination meets both ends exactly, `end + (start - end) * w` does not.
        weight = (1 - t) ** self.power
        return self.start * weight + self.end * (1 - weight)

    def __repr__(self) -> str:
        if self.power == 1:
            return f"linear({self.start:g}, {self.end:g})"
        return f"polynomial({self.start:g}, {self.end:g}, {self.power:g})"


@dataclass(frozen=True)
class Cosine:
    """`end + (start - end) * (1 + cos(pi t)) / 2`. Build it with `cosine`."""

    start: float
    end: float

    def __call__(self, t: Tensor) -> Tensor:
        weight = (1 + torch.cos(math.pi * t)) / 2
        return self.start * weight + self.end * (1 - weight)

    def __repr__(self) -> str:
        return f"cosine({self.start:g}, {self.end:g})"


@dataclass(frozen=True)
class PiecewiseConstant:
    """`values[i]` in part i of as many equal parts as there are values. Build it with `piecewise_constant`."""

    values: tuple[float, ...]

    def __call__(self, t: Tensor) -> Tensor:
        part = (t * len(self.values)).floor().clamp(0, len(self.values) - 1).long()
        return torch.tensor(self.values, dtype=t.dtype, device=t.device)[part]

    def __repr__(self) -> str:
        return f"piecewise_constant({', '.join(f'{value:g}' for value in self.values)})"


@dataclass(frozen=True, eq=False)
class PerChain:
    """Values for each chain: `(B,)` at all times, or `(S, B)` with a row for each update. Build it with `per_chain`."""

    values: Tensor

    @property
    def rows(self) -> int:
        """Of how many updates there are values; 1 where they are the same at all times."""
        return 1 if self.values.dim() == 1 else self.values.shape[0]

    def __call__(self, t: Tensor) -> Tensor:
        """`(S, B)` at S times; as many as there are rows, where there are several."""
        if self.values.dim() == 1:
            return self.values.expand(t.shape[0], -1)
        if self.rows not in (1, t.shape[0]):
            raise ValueError(
                f"a schedule has values for {self.rows} updates, but the chain has {t.shape[0]}: a tensor "
                f"{tuple(self.values.shape)} is (updates, chains), and one for each chain is (B,)"
            )
        return self.values.expand(t.shape[0], -1)

    def __repr__(self) -> str:
        low, high = float(self.values.min()), float(self.values.max())
        return f"per_chain({low:g} to {high:g})"


def per_chain(values: Tensor) -> PerChain:
    """Values for each chain: `(B,)`, the same at all times, or `(S, B)`, with a row for each of S updates.

    A tensor of that shape may be given wherever a schedule of a sampler may be; the values are copied.

    Raises TypeError or ValueError for other shapes, numbers that are not finite, and no values.
    """
    if not isinstance(values, Tensor) or values.is_complex() or values.dtype == torch.bool or values.is_meta:
        raise TypeError(f"values for each chain are a tensor of real numbers, got {shown(values)}")
    if values.dim() not in (1, 2) or not values.numel():
        raise ValueError(f"values for each chain have shape (B,) or (S, B), got {tuple(values.shape)}")
    copy = values.detach().to("cpu", torch.float64, copy=True)
    if not bool(copy.isfinite().all()):
        raise ValueError("values for each chain must be finite")
    return PerChain(copy)


def constant(value: float) -> Constant:
    """`value` at all times."""
    return Constant(*_finite(value=value))


def linear(start: float, end: float) -> Polynomial:
    """A straight line from `start` to `end`; for instance, the noise of the CF-EBM cascade is `linear(0.015, 0.0)`."""
    return polynomial(start, end, 1.0)


def polynomial(start: float, end: float, power: float) -> Polynomial:
    """`end + (start - end) * (1 - t)**power`, for `power > 0`. Powers above 1 change fastest at the start."""
    start, end, power = _finite(start=start, end=end, power=power)
    if power <= 0:
        raise ValueError(f"a polynomial schedule needs power > 0, got {power}")
    return Polynomial(start, end, power)


def cosine(start: float, end: float) -> Cosine:
    """Half a cosine wave from `start` to `end`: flat at both ends, steepest in the middle."""
    return Cosine(*_finite(start=start, end=end))


def piecewise_constant(*values: float) -> PiecewiseConstant:
    """`values[i]` in part i of as many equal parts as there are values.

    A number of updates that is a multiple of the number of values is cut evenly. For a `Cascade` with as many levels as
    values, each level has its own.

    Raises ValueError without a value.

    >>> import fastebm
    >>> fastebm.schedules.evaluate(fastebm.schedules.piecewise_constant(1.0, 4.0), 6)
    tensor([1., 1., 1., 4., 4., 4.], dtype=torch.float64)
    """
    if not values:
        raise ValueError("a piecewise constant schedule needs at least one value")
    return PiecewiseConstant(tuple(_finite(**{f"value {number}": value for number, value in enumerate(values)})))


class StepAndNoise(TypedDict):
    """The two schedules of a sampler, as keyword arguments."""

    step_size: float
    noise_std: float


def from_epsilon(epsilon: float) -> StepAndNoise:
    """`step_size = epsilon**2 / 2` and `noise_std = epsilon`: unadjusted Langevin dynamics at temperature 1.

    Used as `Langevin(energy, **from_epsilon(0.1))`. Published recipes for images often choose the two independently;
    `Langevin.temperature` tells the temperature that they imply.
    """
    epsilon = as_real("epsilon", epsilon)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"from_epsilon needs a finite epsilon > 0, got {epsilon}")
    return {"step_size": epsilon**2 / 2, "noise_std": epsilon}


def as_schedule(value: float | Tensor | Schedule) -> Schedule:
    """`value` as a schedule: `constant(value)` for a real number, `per_chain(value)` for a tensor with one for each
    chain; a callable is returned as it is."""
    if callable(value):
        return value
    if isinstance(value, Tensor) and value.dim():
        return per_chain(value)
    try:
        number = as_real("a schedule", value)
    except TypeError:
        raise TypeError(
            f"a schedule is a number or a callable from times to values, got {type(value).__name__} {shown(value)}"
        ) from None
    return constant(number)


def one_for_all(name: str, value: float | Tensor | Schedule) -> Schedule:
    """`value` as a schedule that is the same for all chains. Raises TypeError for values for each chain."""
    schedule = as_schedule(value)
    if isinstance(schedule, PerChain):
        raise TypeError(
            f"{name} is a number or a callable from times to values, the same for all chains, got {shown(value)}"
        )
    return schedule


def evaluate(schedule: float | Tensor | Schedule, num_steps: int) -> Tensor:
    """The values of a schedule for each of `num_steps` updates: a float64 tensor `(num_steps,)` on the CPU.

    One with values for each chain gives `(num_steps, B)`.

    Raises ValueError if the schedule returns another shape or a value that is not finite.
    """
    num_steps = as_int("num_steps", num_steps)
    if num_steps < 1:
        raise ValueError(f"a schedule is evaluated over at least one step, got num_steps={num_steps}")
    times = torch.linspace(0, 1, num_steps, dtype=torch.float64, device="cpu")
    made = as_schedule(schedule)
    values = made(times)
    if isinstance(made, PerChain):
        return values
    if not isinstance(values, Tensor) or values.shape != times.shape:
        given = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"a schedule must return one value for each time, a tensor of shape {tuple(times.shape)}, got {given}"
        )
    if values.is_complex() or values.is_meta:
        raise ValueError(f"a schedule must return real values, got {shown(values)}")
    values = values.detach().to("cpu", torch.float64)
    if not values.isfinite().all():
        raise ValueError(
            f"the schedule {schedule!r} is not finite at step {int((~values.isfinite()).nonzero()[0])} of {num_steps}"
        )
    return values


def rows_to_try(*schedules: Schedule) -> int:
    """For how many updates schedules can be evaluated together, whatever the chain: 2, or as many as one has rows."""
    return max([2, *(schedule.rows for schedule in schedules if isinstance(schedule, PerChain))])


def evaluate_together(num_steps: int, *given: float | Tensor | Schedule) -> tuple[Tensor, ...]:
    """Several schedules: each `(num_steps,)`, or each `(num_steps, B)` where one has values for each chain."""
    values = [evaluate(schedule, num_steps) for schedule in given]
    counts = {v.shape[1] for v in values if v.dim() == 2}
    if len(counts) > 1:
        raise ValueError(f"schedules have values for different numbers of chains: {sorted(counts)}")
    return tuple(v if v.dim() == 2 or not counts else v[:, None].expand(-1, *counts) for v in values)


def table(step_size: float | Tensor | Schedule, noise_std: float | Tensor | Schedule, num_steps: int) -> Tensor:
    """The float32 table `(num_steps, 2)` of (step size, noise std) that the Langevin kernels read, on the CPU.

    With values for each chain it is `(num_steps, B, 2)`.

    Raises ValueError if a step size is not positive, a noise std is negative, or either overflows float32.
    """
    rows = torch.stack(evaluate_together(num_steps, step_size, noise_std), dim=-1).float()
    for name, column, wrong in (
        ("step_size > 0", rows[..., 0], ~(rows[..., 0] > 0) | rows[..., 0].isinf()),
        ("noise_std >= 0", rows[..., 1], ~(rows[..., 1] >= 0) | rows[..., 1].isinf()),
    ):
        if wrong.any():
            first = wrong.nonzero()[0]
            of_chain = f" of chain {int(first[1])}" if len(first) > 1 else ""
            raise ValueError(
                f"Langevin steps need a finite {name} in float32, "
                f"got {float(column[tuple(first)])} at step {int(first[0])} of {num_steps}{of_chain}"
            )
    return rows
