"""Microcanonical Langevin Monte Carlo, unadjusted and adjusted by a Metropolis test.

Momentum has length 1, so that a chain moves at constant speed and its step does not depend on how steep the energy is.
The integrator is the minimal norm one of Omelyan, with two gradients a step; between two gradients,
`fastebm.ops.mclmc_step_` does all in one pass.

Sources: Robnik, De Luca, Silverstein, Seljak, arXiv 2212.08549, and Robnik, Seljak, arXiv 2303.18221 (MCLMC); Robnik,
Cohn-Gordon, Seljak, arXiv 2503.01707 (adjusted); the step size by the variance of the energy error, arXiv 2412.08876;
the dual averaging of Hoffman, Gelman, JMLR 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastebm import rng
from fastebm.compiler import ScoreGradient
from fastebm.ops.mclmc import RepeatedTurns, flat_mass, ordered_sum
from fastebm.sampling.observers import Observer, checking_finite, progress_bar
from fastebm.sampling.sampler import (
    Energy,
    EnergyState,
    Sampler,
    check_steps,
    constrained,
    copied,
    expand_to,
    gradient_of,
    key_increment,
    number_of_rows,
)
from fastebm.sampling.schedules import PerChain, Schedule, as_schedule, evaluate_together
from fastebm.sampling.state import SamplerState, StepInfo
from fastebm.scalars import as_count, as_int, as_real, shown

Mass = float | Tensor

# The times of the five parts of a step: turn, move by half, turn, move by half, turn (McLachlan 1995, Omelyan 2003).
OUTER = 0.1931833275037836
# A step whose squared error is so many times its target was 10 times too long; the chain goes back.
LOST = 1e6
# Of one chain among many, no more is counted than this.
OUTLIER = 1e3
# How the log of a step size follows errors: within 1 / (6 GAIN) steps.
GAIN = 0.15
# So many errors make an average that may change a step size.
AT_LEAST = 10


def _check_state(state: SamplerState, columns: str, inverse_mass: Tensor | None, warm_up_steps: int) -> None:
    count, table = state.x.shape[0], state.schedule
    width = len(columns.split(", "))
    fits = table.dim() == 2 or (table.dim() == 3 and table.shape[1] == count)
    if table.dtype != torch.float32 or not fits or not len(table) or table.shape[-1] != width:
        raise ValueError(f"a chain's schedule is a float32 table of ({columns}), got {shown(table)}")
    if not bool((table > 0).all()) or not bool(table[..., 0].isfinite().all()):
        raise ValueError(f"a chain's schedule has positive numbers ({columns}), got others")
    elements = state.x.numel() // max(count, 1)
    if inverse_mass is not None and (
        inverse_mass.dtype != state.x.dtype
        or inverse_mass.dim() != 2
        or inverse_mass.shape[0] not in (1, count)
        or inverse_mass.shape[1] not in (1, elements)
    ):
        raise ValueError(
            f"a chain's inverse_mass must be {state.x.dtype} (1 or {count}, 1 or {elements}), got {shown(inverse_mass)}"
        )
    if as_int("warm_up_steps", warm_up_steps) < 0:
        raise ValueError(f"a chain's warm_up_steps must not be negative, got {warm_up_steps}")


@dataclass(frozen=True, eq=False)
class MicrocanonicalState(SamplerState):
    """All that the next step of `B` microcanonical chains depends on, besides the energy.

    The momentum of a state lacks the last turn of its step, which is made with the gradient of the next one.

    Attributes (besides those of `SamplerState`):
        schedule: float32 `(S, 3)` or `(S, B, 3)` rows of (step size, decoherence length, temperature).
        momentum: like `x`, of length 1 over each chain; None until the first step draws it.
        work: float64 `(B, 2)`, the changes of the kinetic energy so far, by last turns of steps and by others.
        energy, total: float64 `(B,)`, the energy where the last step began, and the sum of `work` there.
        inverse_mass: `(1 or B, 1 or N)`, in `x`'s dtype; 0 for entries that are held.
        warm_up_steps: the number of steps of a warm-up by which the schedule was found, which is frozen since then; 0
            for one that was given.
    """

    momentum: Tensor | None = None
    work: Tensor | None = None
    energy: Tensor | None = None
    total: Tensor | None = None
    inverse_mass: Tensor | None = None
    warm_up_steps: int = 0

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Momentum, work, energy and total, of a state that has them."""
        if self.momentum is None or self.work is None or self.energy is None or self.total is None:
            raise ValueError("this state has no momentum yet: a step draws it")
        return self.momentum, self.work, self.energy, self.total

    def check(self) -> None:
        super().check()
        _check_state(self, "step size, decoherence length, temperature", self.inverse_mass, self.warm_up_steps)
        count = self.x.shape[0]
        if len({value is None for value in (self.momentum, self.work, self.energy, self.total)}) > 1:
            raise ValueError("a chain's momentum, work, energy and total go together, got only some of them")
        kinds = {
            "momentum": (self.x.shape, self.x.dtype),
            "work": ((count, 2), torch.float64),
            "energy": ((count,), torch.float64),
            "total": ((count,), torch.float64),
        }
        for name, (shape, dtype) in kinds.items():
            value = getattr(self, name)
            if value is not None and (value.shape != shape or value.dtype != dtype):
                raise ValueError(f"a chain's {name} must be {dtype} {tuple(shape)}, got {shown(value)}")


@dataclass(frozen=True, eq=False)
class AdjustedState(EnergyState):
    """All that the next trajectory of `B` adjusted microcanonical chains depends on, besides the energy.

    Attributes (besides those of `EnergyState`, whose `mask` is None: held entries have an inverse mass of 0):
        schedule: float32 `(S, 2)` or `(S, B, 2)` rows of (step size, temperature).
        inverse_mass, warm_up_steps: as in `MicrocanonicalState`.
    """

    inverse_mass: Tensor | None = None
    warm_up_steps: int = 0

    def check(self) -> None:
        super().check()
        _check_state(self, "step size, temperature", self.inverse_mass, self.warm_up_steps)


@dataclass(frozen=True, eq=False)
class MicrocanonicalInfo(StepInfo):
    """One step of `MCLMC`.

    Attributes (besides those of `StepInfo`):
        energy_error: float64 `(B,)`, over the temperature, of the step that led to `before`; NaN for the first.
    """

    energy_error: Tensor


@dataclass(frozen=True, eq=False)
class AdjustedInfo(StepInfo):
    """One trajectory of `AdjustedMCLMC`.

    Attributes (besides those of `StepInfo`):
        accepted: bool `(B,)`.
        log_ratio: float64 `(B,)`, minus the energy error of the trajectory over the temperature.
    """

    accepted: Tensor
    log_ratio: Tensor

    @property
    def acceptance_probability(self) -> Tensor:
        """`min(1, exp(log_ratio))`, float64 `(B,)`; 0 where the ratio is NaN."""
        return self.log_ratio.clamp(max=0).exp().nan_to_num(nan=0.0)


class _Microcanonical(Sampler[Any]):
    """What both samplers share: options, starts, masses."""

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule | None,
        temperature: float | Tensor | Schedule,
        mass: Mass,
        dtype: torch.dtype | None,
        engine: str,
        reproducible: bool,
        needs_energy: str = "",
    ) -> None:
        self.gradient = gradient_of(energy, dtype, engine, reproducible, needs_energy=needs_energy)
        self.step_size = None if step_size is None else as_schedule(step_size)
        self.temperature = as_schedule(temperature)
        self.mass = _check_mass(mass)
        self._check_schedules()

    def _check_schedules(self) -> None:
        """Finds a wrong range here rather than at the first chain."""
        given = self._schedules()
        _positive(max([2, *(s.rows for s in given.values() if isinstance(s, PerChain))]), **given)

    def _values(self, num_steps: int | None, dimensions: Tensor, guess: bool) -> dict[str, Tensor]:
        """Schedules by name, (S,) or (S, B), with a guess of the step size in a warm-up that was given none."""
        given = self._schedules()
        if self.step_size is None:
            if not guess:
                raise ValueError(f"{type(self).__name__} has no step_size: give one, or begin with warm_up")
            # A quarter of the radius of a Gaussian of scale 1.
            step_size = 0.25 * dimensions.cpu().sqrt()
            given["step_size"] = as_schedule(step_size if len(step_size) > 1 else float(step_size))
        rows = number_of_rows(num_steps, *given.values())
        return dict(zip(given, _positive(rows, **given), strict=True))

    def _check_warm_up(self, start_step: int, num_steps: int) -> int:
        """The steps of a warm-up. Raises ValueError for schedules that are not constant."""
        _, num_steps = check_steps(start_step, as_count("num_steps", num_steps, 1))
        for name, schedule in self._schedules().items():
            if number_of_rows(2, schedule) > 1:
                raise ValueError(f"warm_up finds one step size for all steps, but {name} is {schedule!r}, not constant")
        return num_steps

    def _schedules(self) -> dict[str, Schedule]:
        """The schedules that were given, by name."""
        given = {} if self.step_size is None else {"step_size": self.step_size}
        return given | {"temperature": self.temperature}

    def _masses(self, x0: Tensor, mask: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """(x with its known entries, the inverse mass as the operator takes it, the free dimensions (1,) or (B,)).

        Raises ValueError where a chain has less than two.
        """
        x, held = constrained(x0, mask, known)
        if x.dim() < 2 or x[:1].numel() < 2 * len(x[:1]):
            raise ValueError(f"microcanonical chains need at least 2 dimensions, got x0 of shape {tuple(x0.shape)}")
        inverse: Tensor | None = None
        if not (isinstance(self.mass, float) and self.mass == 1):
            mass = torch.as_tensor(self.mass, dtype=torch.float64, device=x.device)
            inverse = flat_mass(
                1 / expand_to(x.shape, "mass", mass, x.device)[: len(mass) if mass.dim() == x.dim() else 1], x
            )
        elements = x.numel() // max(len(x), 1)
        if held is None:
            return x, inverse, torch.full((1,), float(elements), dtype=torch.float64, device=x.device)
        inverse = torch.where(held.flatten(1), 0, x.new_ones(1, 1) if inverse is None else inverse)
        dimensions = (inverse != 0).sum(1).double()
        if len(x) and int(dimensions.min()) < 2:
            raise ValueError(
                f"microcanonical chains need at least 2 free entries, but the mask leaves {int(dimensions.min())}"
            )
        return x, inverse, dimensions

    def _shown(self, **options: Any) -> str:
        given = self._schedules() | options
        if not isinstance(self.mass, float) or self.mass != 1:
            given["mass"] = self.mass if isinstance(self.mass, float) else tuple(self.mass.shape)
        return f"{type(self).__name__}({self.gradient!r}; {', '.join(f'{n}={v!r}' for n, v in given.items())})"


def _positive(num_steps: int, **schedules: float | Tensor | Schedule) -> tuple[Tensor, ...]:
    """Schedules together, as float64 `(S,)` or `(S, B)`. Raises ValueError for one that is not positive in float32."""
    values = evaluate_together(num_steps, *schedules.values())
    for name, value in zip(schedules, values, strict=True):
        rounded = value.float()
        fits = (rounded > 0) & rounded.isfinite()
        if not bool(fits.all()):
            raise ValueError(f"{name} must be finite and positive in float32, got {float(value[~fits][0])}")
    return values


def _check_mass(mass: Any) -> Mass:
    """A positive float, or a copy of a tensor. Raises TypeError or ValueError for anything else."""
    if not isinstance(mass, Tensor):
        value = as_real("mass", mass)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"mass must be finite and positive, got {mass}")
        return value
    if not mass.is_floating_point() or mass.is_meta:
        raise TypeError(f"mass must be a number or a tensor of floating point numbers, got {shown(mass)}")
    if not bool(((mass > 0) & mass.isfinite()).all()):
        raise ValueError("mass must be finite and positive, got other numbers")
    return mass.detach().clone()


def _table(x: Tensor, *columns: Tensor) -> Tensor:
    """A float32 table of (S,) or (S, B) columns on x's device. Raises ValueError where B is not that of x."""
    widths = {c.shape[1] for c in columns if c.dim() == 2}
    if widths - {len(x)}:
        raise ValueError(f"a value for each of {min(widths)} chains was given, but there are {len(x)}")
    shape = (max(len(c) for c in columns), *widths)
    wide = [c[:, None] if widths and c.dim() == 1 else c for c in columns]
    return torch.stack([c.expand(shape) for c in wide], dim=-1).float().to(x.device)


def _ordered_mean(values: Tensor) -> Tensor:
    """The mean over chains, in the order of the index."""
    return values.cumsum(0)[-1:] / len(values)


# Unadjusted ---------------------------------------------------------------------------------------------------------


class _Turns:
    """The coefficients of the two passes of a step, for the row of a schedule that a key stands at."""

    def __init__(self, schedule: Tensor, dimensions: Tensor) -> None:
        self.rows = schedule.shape[0]
        wide = schedule if schedule.dim() == 3 else schedule[:, None]
        wide = wide.double().expand(-1, max(wide.shape[1], len(dimensions)), -1)
        h, length, self.temperature = wide.unbind(-1)
        refresh = (torch.expm1(2 * h / length) / dimensions).sqrt()
        turn = OUTER * h / self.temperature
        # Row k ends the step of row k - 1; there is one row more, for the step behind the last of the schedule.
        after = torch.arange(self.rows + 1, device=schedule.device).clamp(max=self.rows - 1)
        before = torch.arange(-1, self.rows, device=schedule.device).clamp(min=0)
        self.outer = torch.stack((turn[before], refresh[after], turn[after], h[after] / 2), dim=-1)
        self.middle = torch.stack((0 * h, 0 * h, (1 - 2 * OUTER) * h / self.temperature, h / 2), dim=-1)

    def at(self, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(outer, middle, temperature of the step before)."""
        if self.rows == 1:
            return self.outer[0], self.middle[0], self.temperature[0]
        index = key[2:]
        return (
            self.outer.index_select(0, index.clamp(max=self.rows))[0],
            self.middle.index_select(0, index.clamp(max=self.rows - 1))[0],
            self.temperature.index_select(0, (index - 1).clamp(0, self.rows - 1))[0],
        )


class MCLMC(_Microcanonical):
    """Microcanonical Langevin Monte Carlo without a test: `p(x) ~ exp(-E(x) / T)` up to an error set by the step size.

    The field's choice for many dimensions, where tests would need ever shorter steps. A step costs two evaluations of
    the gradient. `warm_up` finds the step size at which the squared energy error of a step, over the dimensions,
    averages 5e-4.

    Args:
        energy: as `Langevin` takes it. A score alone serves for `sample`, not for `warm_up`.
        step_size: the length of a step's path, which is long beside that of other samplers, about a quarter of the
            root of the dimensions times the scale of x; a positive number, a schedule, or a tensor with one for each
            chain. None leaves it to `warm_up`.
        decoherence_length: the path over which the momentum is forgotten, likewise; None for the root of the
            dimensions times T, right where x has scale 1, and measured by `warm_up`.
        temperature: T, as `step_size`.
        mass: a positive number, or a tensor that broadcasts to x0, of one for each entry: 1 / its variance is best.
        dtype, engine, reproducible: passed to `energy_gradient`.

    Raises ValueError or TypeError for options out of range.

    Example:
        >>> import torch, fastebm
        >>> normal = fastebm.MCLMC(lambda x: 0.5 * x.square().sum(1), step_size=2.0)
        >>> x = normal.sample(torch.zeros(1000, 20), num_steps=50, seed=1)
        >>> bool((x.std() - 1).abs() < 0.02)
        True
    """

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule | None = None,
        decoherence_length: float | Tensor | Schedule | None = None,
        *,
        temperature: float | Tensor | Schedule = 1.0,
        mass: Mass = 1.0,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        reproducible: bool = True,
    ) -> None:
        self.decoherence_length = None if decoherence_length is None else as_schedule(decoherence_length)
        super().__init__(energy, step_size, temperature, mass, dtype, engine, reproducible)

    def _schedules(self) -> dict[str, Schedule]:
        length = self.decoherence_length
        return super()._schedules() | ({} if length is None else {"decoherence_length": length})

    def __repr__(self) -> str:
        return self._shown()

    @torch.no_grad()
    def init(
        self,
        x0: Tensor,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        num_chains: int | None = None,
        start_step: int = 0,
        num_steps: int | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        conditions: Sequence[Tensor] = (),
    ) -> MicrocanonicalState:
        """The state from which chains start; arguments as in `Langevin.init`.

        Entries where the mask is True stay at `known`; the chain moves in the others, of which it needs two.
        """
        return self._init(x0, seed, chain_ids, num_chains, start_step, num_steps, mask, known, conditions, guess=False)

    def _init(
        self,
        x0: Tensor,
        seed: int | None,
        chain_ids: int | Tensor,
        num_chains: int | None,
        start_step: int,
        num_steps: int | None,
        mask: Tensor | None,
        known: Tensor | None,
        conditions: Sequence[Tensor],
        guess: bool,
    ) -> MicrocanonicalState:
        start_step, _ = check_steps(start_step, 0 if num_steps is None else num_steps)
        start = self._common(
            x0, seed, chain_ids, num_chains, start_step, conditions, torch.empty(0, 0), torch.contiguous_format
        )
        start["x"], inverse_mass, dimensions = self._masses(start["x"], mask, known)
        values = self._values(num_steps, dimensions, guess)
        if "decoherence_length" not in values:
            heat = values["temperature"]
            heat = heat[:, None] if len(dimensions) > 1 and heat.dim() == 1 else heat
            values["decoherence_length"] = (heat * dimensions.cpu()).sqrt()
        start["schedule"] = _table(start["x"], *(values[n] for n in ("step_size", "decoherence_length", "temperature")))
        return MicrocanonicalState(**start, inverse_mass=inverse_mass)

    def _started(self, state: MicrocanonicalState) -> tuple[MicrocanonicalState, bool]:
        """The state with a momentum, and whether that was drawn now."""
        if state.momentum is not None:
            return state, False
        x, count = state.x, state.x.shape[0]
        momentum, work = torch.zeros_like(x), x.new_zeros(count, 2, dtype=torch.float64)
        draw = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64, device=x.device)
        torch.ops.fastebm.mclmc_step_(
            x, momentum, work, x.clone(), draw, state.key, state.chain_ids, state.inverse_mass
        )
        unknown = work.new_full((2, count), math.nan)
        return replace(state, momentum=momentum, work=work, energy=unknown[0], total=unknown[1]), True

    def _updater(
        self, state: MicrocanonicalState, first: bool, turns: Callable[[], tuple[Tensor, Tensor, Tensor]]
    ) -> Callable[[bool], tuple[Tensor, Tensor, Tensor]]:
        """A function that takes a step of a started state in place: (energy and gradient before it, energy error of the
        step before). The last two are there where `errors` asks for them, as it must at the last step."""
        x, (u, work, energy, total) = state.x, state.kept
        one = key_increment(state.key)
        turn = RepeatedTurns(x, u, work, state.key, state.chain_ids, state.inverse_mass)

        def update(errors: bool) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal first
            outer, middle, temperature = turns()
            if first:  # no step ends here, and the momentum is fresh
                outer = outer * outer.new_tensor([0.0, 0.0, 1.0, 1.0])
                first = False
            found, gradient = self.gradient(x, state.conditions)
            begun, error = work[:, 1].clone() if errors else work, energy
            turn(gradient, outer)
            if errors:
                begun += work[:, 0]
                error = (found.double() - energy) / temperature + (begun - total)
                if isinstance(self.gradient, ScoreGradient):
                    error.fill_(math.nan)
                total.copy_(begun)
                gradient = gradient.clone()  # the engine may write the next one to the same memory
            energy.copy_(found)
            _, second = self.gradient(x, state.conditions)
            turn(second, middle)
            state.key.add_(one)
            return energy, gradient, error

        return update

    @torch.no_grad()
    def step(self, state: MicrocanonicalState) -> tuple[MicrocanonicalState, MicrocanonicalInfo]:
        """One step. `state` is left as it was."""
        check_steps(state.step, 1)
        with self.gradient.chain():
            before = state.x
            after, first = self._started(copied(state))
            energy, gradient, error = self._updater(after, first, self._turns(after))(True)
            self.gradient.leave_soon()
        info = MicrocanonicalInfo(energy.clone(), gradient, before, after.x, error)
        return replace(after, step=after.step + 1), info

    @torch.no_grad()
    def advance_(
        self, state: MicrocanonicalState, num_steps: int, observers: Sequence[Observer] = ()
    ) -> MicrocanonicalState:
        _, num_steps = check_steps(state.step, num_steps)
        if num_steps == 0:
            return state
        with self.gradient.chain():
            state, first = self._started(state)
            update = self._updater(state, first, self._turns(state))
            for done in range(1, num_steps + 1):
                energy, _, _ = update(done == num_steps)
                for observe in observers:
                    observe(done, state.x, energy)
            self.gradient.leave_soon()
        return replace(state, step=state.step + num_steps)

    def _turns(self, state: MicrocanonicalState) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        turns = _Turns(state.schedule, _free_dimensions(state.x, state.inverse_mass))
        return lambda: turns.at(state.key)

    @torch.no_grad()
    def warm_up(
        self,
        x0: Tensor,
        num_steps: int,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        num_chains: int | None = None,
        start_step: int = 0,
        target: float = 5e-4,
        pooled: bool = False,
        progress: bool = False,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        conditions: Sequence[Tensor] = (),
        check: bool = True,
    ) -> MicrocanonicalState:
        """The state after `num_steps` steps that adapt the step size, and the decoherence length where none was given.

        `run(state, ...)` samples on from it. What was found is in the state's schedule, frozen.

        Args:
            x0, seed, chain_ids, num_chains, start_step, mask, known, conditions: as in `init`.
            num_steps: 100 or more are sensible; `step_size`, where it was given, is that of the first.
            target: the energy-error variance per dimension, the mean of (energy error / T)^2 / d of a step; smaller
                means less bias and shorter steps, which go with its sixth root.
            pooled: one step size for all chains, by the average of their errors. Chains then depend on each other:
                without it, each has its own, and the bits of a chain don't depend on the others.
            progress: shows a bar with the mean energy.
            check: as in `sample`. A chain whose step fails goes back and takes half of it; it is lost only where its
                energy is not finite at the start.

        The decoherence length becomes the root of the sum of variances (over masses) along the chain in the second
        quarter of the steps.

        Raises ValueError for schedules that are not constant, and TypeError for a score.
        """
        if not (math.isfinite(target := as_real("target", target)) and target > 0):
            raise ValueError(f"target must be finite and positive, got {target}")
        gradient_of(self.gradient, None, "auto", True, needs_energy="warm_up")
        num_steps = self._check_warm_up(start_step, num_steps)
        state = self._init(x0, seed, chain_ids, num_chains, start_step, None, mask, known, conditions, guess=True)
        with (
            progress_bar(num_steps, progress) as bar,
            checking_finite(state, check) as watch,
            self.gradient.chain(),
        ):
            state = self._warm_up_(state, num_steps, target, pooled, [*watch, *bar])
            self.gradient.leave_soon()
        return state

    def _warm_up_(
        self, state: MicrocanonicalState, num_steps: int, target: float, pooled: bool, observers: Sequence[Observer]
    ) -> MicrocanonicalState:
        state, first = self._started(state)
        x, momentum, count = state.x, state.kept[0], state.x.shape[0]
        dimensions = _free_dimensions(x, state.inverse_mass)
        h, length, temperature = (c.expand(count) for c in state.schedule[0].double().reshape(-1, 3).unbind(-1))
        turns = _Turns(state.schedule, dimensions).at(state.key)
        update = self._updater(state, first, lambda: turns)
        sizes, moments = _StepSizes(target, dimensions, pooled, h, num_steps), _Moments(x)
        skipped = torch.ones(count, dtype=torch.bool, device=x.device)
        before: tuple[Tensor, Tensor] | None = None
        for done in range(1, num_steps + 1):
            now = x.clone(), momentum.clone()
            energy, _, error = update(True)
            lost = sizes.add(error, skipped)
            if before is not None:
                by_chain = lost.reshape(-1, *(1,) * (x.dim() - 1))
                for tensor, earlier in zip((x, momentum), before, strict=True):
                    torch.where(by_chain, earlier, tensor, out=tensor)
            before, skipped = now, lost
            if num_steps // 4 < done <= num_steps // 2:
                moments.add(x)
            if done == num_steps // 2 and self.decoherence_length is None and moments.count > 1:
                length = moments.root_of_variances(state.inverse_mass, pooled).expand(count)
            row = torch.stack((sizes.h, length, temperature), dim=-1)[None].float()
            following = _Turns(row, dimensions)
            # The turn that ends this step is of its own size.
            closing = turns[0].expand(count, 4)[:, 2:3]
            turns = (
                torch.cat((closing, following.outer[0][:, 1:]), dim=1),
                following.middle[0],
                following.temperature[0],
            )
            state = replace(state, schedule=row)
            for observe in observers:
                observe(done, x, energy)
        # As if the last step had had the frozen size: what is left of it is a turn.
        return replace(state, step=state.step + num_steps, warm_up_steps=num_steps)


class _StepSizes:
    """Step sizes h of chains at which the mean of error^2 / (target d) is 1.

    In the first half of the steps, log h follows the errors by stochastic approximation, which leaves any start behind.
    The second half averages error^2 / h^6 instead, of which h is the inverse sixth root: there what h was matters not.
    """

    def __init__(self, target: float, dimensions: Tensor, pooled: bool, h: Tensor, num_steps: int) -> None:
        self.scale, self.pooled, self.search = 1 / (target * dimensions), pooled, num_steps // 2
        self.h = self.of_last = h  # the latter is that of the step whose error comes next
        self.ratios, self.seen = torch.zeros_like(h), torch.zeros_like(h)

    def add(self, error: Tensor, skipped: Tensor) -> Tensor:
        """Adapts to the errors of the last step, but those that are skipped. Returns which steps failed."""
        value = error.square() * self.scale
        failed = ~(value < LOST) & ~skipped  # also where it is NaN
        value = torch.where(failed, LOST, value)
        halved = failed
        if self.pooled:
            share = _ordered_mean((~skipped).double())
            value = _ordered_mean(torch.where(skipped, 0.0, value.clamp(max=OUTLIER))) / share.clamp(min=1e-300)
            skipped, halved = share == 0, value == OUTLIER
        counted = ~skipped & ~halved
        if self.search > 0:
            moved = self.h * (GAIN * (1 - value)).clamp(min=-math.log(2)).exp()
        else:
            self.seen = torch.where(halved, 0.0, self.seen + counted.double())
            ratio = value.clamp(max=OUTLIER) / self.of_last**6
            mean = self.ratios + (ratio - self.ratios) / self.seen.clamp(min=1)
            self.ratios = torch.where(counted, mean, self.ratios)
            moved = torch.where(self.seen < AT_LEAST, self.h, self.ratios.clamp(min=1e-300) ** (-1 / 6))
        self.search -= 1
        self.of_last, self.h = self.h, torch.where(halved, self.h / 2, torch.where(counted, moved, self.h))
        return failed


class _Moments:
    """Means and sums of squares of the entries of chains along their steps (Welford)."""

    def __init__(self, x: Tensor) -> None:
        self.count = 0
        self.mean, self.squares = torch.zeros_like(x), torch.zeros_like(x)

    def add(self, x: Tensor) -> None:
        self.count += 1
        difference = x - self.mean
        self.mean += difference / self.count
        self.squares += difference * (x - self.mean)

    def root_of_variances(self, inverse_mass: Tensor | None, pooled: bool) -> Tensor:
        """The root of the sum of variances over inverse masses, of each chain (B,) or (1,) of all."""
        squares = self.squares.flatten(1).double() / self.count
        if pooled:
            between = self.mean.flatten(1).double()
            between = between - _ordered_mean(between)
            squares = _ordered_mean(squares + between.square())
        weights = torch.ones_like(squares)
        if inverse_mass is not None:
            weights = torch.where(inverse_mass == 0, 0.0, 1 / inverse_mass.double()).expand(len(self.mean), -1)
            weights = weights[: len(squares)].expand_as(squares)
        found = ordered_sum(squares, weights).sqrt()
        return torch.where((found > 0) & found.isfinite(), found, 1.0)


def _free_dimensions(x: Tensor, inverse_mass: Tensor | None) -> Tensor:
    """float64 (1,) or (B,): how many entries of a chain move."""
    elements = x.numel() // max(len(x), 1)
    if inverse_mass is None or inverse_mass.shape[1] == 1:
        return torch.full((1,), float(elements), dtype=torch.float64, device=x.device)
    return (inverse_mass != 0).sum(1).double()


# Adjusted -----------------------------------------------------------------------------------------------------------


class AdjustedMCLMC(_Microcanonical):
    """Metropolis-adjusted microcanonical sampling (MAMS): samples `p(x) ~ exp(-E(x) / T)` exactly.

    A step draws a fresh momentum of uniform direction, follows the microcanonical integrator for `trajectory_steps`
    steps, and accepts the end by the error of the total energy; else x stays. It costs twice `trajectory_steps`
    evaluations of the energy's gradient. Aim at 0.9 accepted: see `warm_up`.

    Args:
        energy: as `Langevin` takes it; a score alone can't be tested.
        step_size: the length of the path of one step of the integrator, as `MCLMC`'s; None leaves it to `warm_up`.
        trajectory_steps: steps in a trajectory, the same for all chains, which run side by side. A path of about the
            root of the dimensions times the scale of x is best.
        temperature: T, a positive number, a schedule, or a tensor with one for each chain.
        mass: a positive number, or a tensor that broadcasts to x0, of one for each entry.
        jitter: each trajectory of each chain has a step size of its own, drawn from `step_size * (1 +- jitter)`; it
            breaks the resonance of trajectories with the periods of the target. In [0, 1).
        dtype, engine, reproducible: passed to `energy_gradient`.

    Raises ValueError or TypeError for options out of range.

    Example:
        >>> import torch, fastebm
        >>> normal = fastebm.AdjustedMCLMC(lambda x: 0.5 * x.square().sum(1), step_size=2.0, trajectory_steps=2)
        >>> x = normal.sample(torch.zeros(1000, 20), num_steps=30, seed=1)
        >>> bool((x.std() - 1).abs() < 0.02)
        True
    """

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule | None = None,
        trajectory_steps: int = 4,
        *,
        temperature: float | Tensor | Schedule = 1.0,
        mass: Mass = 1.0,
        jitter: float = 0.0,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        reproducible: bool = True,
    ) -> None:
        super().__init__(energy, step_size, temperature, mass, dtype, engine, reproducible, "AdjustedMCLMC")
        self.trajectory_steps = as_count("trajectory_steps", trajectory_steps, 1)
        self.jitter = as_real("jitter", jitter)
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {jitter}")

    def __repr__(self) -> str:
        return self._shown(trajectory_steps=self.trajectory_steps, **({"jitter": self.jitter} if self.jitter else {}))

    @torch.no_grad()
    def init(
        self,
        x0: Tensor,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        num_chains: int | None = None,
        start_step: int = 0,
        num_steps: int | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        conditions: Sequence[Tensor] = (),
    ) -> AdjustedState:
        """The state from which chains start; arguments as in `Langevin.init`. A step is one trajectory.

        With a mask, p is that of the free entries given the known ones; a chain needs two free ones.
        """
        return self._init(x0, seed, chain_ids, num_chains, start_step, num_steps, mask, known, conditions, guess=False)

    def _init(
        self,
        x0: Tensor,
        seed: int | None,
        chain_ids: int | Tensor,
        num_chains: int | None,
        start_step: int,
        num_steps: int | None,
        mask: Tensor | None,
        known: Tensor | None,
        conditions: Sequence[Tensor],
        guess: bool,
    ) -> AdjustedState:
        start_step, _ = check_steps(start_step, 0 if num_steps is None else num_steps)
        start = self._common(
            x0, seed, chain_ids, num_chains, start_step, conditions, torch.empty(0, 0), torch.contiguous_format
        )
        start["x"], inverse_mass, dimensions = self._masses(start["x"], mask, known)
        values = self._values(num_steps, dimensions, guess)
        start["schedule"] = _table(start["x"], values["step_size"], values["temperature"])
        return AdjustedState(**start, inverse_mass=inverse_mass)

    def _evaluated(self, state: AdjustedState) -> AdjustedState:
        """The state with its energy and gradient, which are evaluated where they are missing."""
        if state.energy is not None:
            return state
        energy, gradient = self.gradient(state.x, state.conditions)
        return replace(state, energy=energy.clone(), gradient=gradient.contiguous().clone())

    def _trajectory(self, state: AdjustedState) -> tuple[Tensor, Tensor]:
        """One trajectory of a state that has its energy, in place: accepted and log_ratio."""
        energy, gradient = state.kept
        count = state.x.shape[0]
        row = state.schedule.index_select(0, state.key[2:].clamp(max=len(state.schedule) - 1))[0].double()
        h, temperature = row.reshape(-1, 2).unbind(-1)
        if self.jitter:
            h = h * (1 + self.jitter * (2 * _uniform(state, rng.Stream.TRAJECTORY_LENGTH) - 1))
        # By rows: the start with its draw, the middle of a step, between two steps, the end.
        zero, turn = torch.zeros_like(h), OUTER * h / temperature
        inner, move = (1 - 2 * OUTER) * h / temperature, h / 2
        start = torch.stack((zero, zero + 1, turn, move), dim=-1)
        middle = torch.stack((zero, zero, inner, move), dim=-1)
        between = torch.stack((zero, zero, 2 * turn, move), dim=-1)
        end = torch.stack((turn, zero, zero, zero), dim=-1)

        x, momentum = state.x.clone(), torch.zeros_like(state.x)
        work = x.new_zeros(count, 2, dtype=torch.float64)
        pass_ = RepeatedTurns(x, momentum, work, state.key, state.chain_ids, state.inverse_mass)
        pass_(gradient, start)
        for done in range(1, self.trajectory_steps + 1):
            _, slope = self.gradient(x, state.conditions)
            pass_(slope, middle)
            found, slope = self.gradient(x, state.conditions)
            pass_(slope, end if done == self.trajectory_steps else between)
        log_ratio = -((found.double() - energy.double()) / temperature + (work[:, 0] + work[:, 1]))
        accepted = (_uniform(state, rng.Stream.ACCEPTANCE).log() < log_ratio) & found.isfinite()
        by_chain = accepted.reshape(-1, *(1,) * (x.dim() - 1))
        torch.where(by_chain, x, state.x, out=state.x)
        torch.where(by_chain, slope.to(gradient.dtype), gradient, out=gradient)
        torch.where(accepted, found, energy, out=energy)
        state.key.add_(key_increment(state.key))
        return accepted, log_ratio

    @torch.no_grad()
    def step(self, state: AdjustedState) -> tuple[AdjustedState, AdjustedInfo]:
        """One trajectory and its test. `state` is left as it was.

        Energy and gradient are taken from the state, where it has them: for other weights, give it with both None.
        """
        check_steps(state.step, 1)
        with self.gradient.chain():
            before = self._evaluated(state)
            after = copied(before)
            tested = self._trajectory(after)
            self.gradient.leave_soon()
        return replace(after, step=after.step + 1), AdjustedInfo(*before.kept, before.x, after.x, *tested)

    @torch.no_grad()
    def advance_(self, state: AdjustedState, num_steps: int, observers: Sequence[Observer] = ()) -> AdjustedState:
        _, num_steps = check_steps(state.step, num_steps)
        with self.gradient.chain():
            state = self._evaluated(state)
            energy, _ = state.kept
            for done in range(1, num_steps + 1):
                before = energy.clone() if observers else energy
                self._trajectory(state)
                for observe in observers:
                    observe(done, state.x, before)
            self.gradient.leave_soon()
        return replace(state, step=state.step + num_steps)

    @torch.no_grad()
    def warm_up(
        self,
        x0: Tensor,
        num_steps: int,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        num_chains: int | None = None,
        start_step: int = 0,
        target: float = 0.9,
        pooled: bool = False,
        progress: bool = False,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        conditions: Sequence[Tensor] = (),
        check: bool = True,
    ) -> AdjustedState:
        """The state after `num_steps` trajectories that adapt the step size by dual averaging.

        `run(state, ...)` samples on from it. What was found is in the state's schedule, frozen.

        Args:
            x0, seed, chain_ids, num_chains, start_step, mask, known, conditions: as in `init`.
            num_steps: 100 or more are sensible; `step_size`, where it was given, is that of the first.
            target: the mean acceptance probability, in (0, 1).
            pooled: one step size for all chains, by their mean acceptance. Chains then depend on each other: without
                it, each has its own, and the bits of a chain don't depend on the others.
            progress: shows a bar with the mean energy.
            check: as in `sample`.

        Raises ValueError for schedules that are not constant.
        """
        if not 0 < as_real("target", target) < 1:
            raise ValueError(f"target must be an acceptance in (0, 1), got {target}")
        num_steps = self._check_warm_up(start_step, num_steps)
        state = self._init(x0, seed, chain_ids, num_chains, start_step, None, mask, known, conditions, guess=True)
        count = len(state.x)
        h, temperature = (c.expand(count) for c in state.schedule[0].double().reshape(-1, 2).unbind(-1))
        center, log_step = (10 * h).log(), h.log()
        average, missing = torch.zeros_like(h), torch.zeros_like(h)
        with (
            progress_bar(num_steps, progress) as bar,
            checking_finite(state, check) as watch,
            self.gradient.chain(),
        ):
            state = self._evaluated(state)
            for done in range(1, num_steps + 1):
                row = torch.stack((log_step.exp(), temperature), dim=-1)[None].float()
                state = replace(state, schedule=row)
                energy = state.kept[0].clone()
                _, log_ratio = self._trajectory(state)
                accepted = log_ratio.clamp(max=0).exp().nan_to_num(nan=0.0)
                if pooled:
                    accepted = _ordered_mean(accepted)
                # Hoffman and Gelman's constants: gamma 0.05, t0 10, kappa 0.75.
                missing = missing + (target - accepted - missing) / (done + 10)
                log_step = center - missing * math.sqrt(done) / 0.05
                average = average + (log_step - average) * done**-0.75
                for observe in (*watch, *bar):
                    observe(done, state.x, energy)
            self.gradient.leave_soon()
        frozen = torch.stack((average.exp().expand(count), temperature), dim=-1)[None].float()
        return replace(state, schedule=frozen, step=state.step + num_steps, warm_up_steps=num_steps)


def _uniform(state: SamplerState, stream: rng.Stream) -> Tensor:
    """float64 (B,): a uniform number in (0, 1] for each chain."""
    shape = [state.x.shape[0], 1]
    return torch.ops.fastebm.uniform(shape, state.key, state.chain_ids, int(stream), torch.float32)[:, 0].double()


__all__ = ["MCLMC", "AdjustedInfo", "AdjustedMCLMC", "AdjustedState", "MicrocanonicalInfo", "MicrocanonicalState"]
