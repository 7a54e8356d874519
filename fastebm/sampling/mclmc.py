"""Microcanonical Langevin Monte Carlo, unadjusted and adjusted by a Metropolis test.

Momentum has length 1, so that a chain moves at constant speed and its step does not depend on how steep the energy is.
The integrator is the minimal norm one of Omelyan, with two gradients a step; between two gradients,
`fastebm.ops.mclmc_step_` does all in one pass.

Sources: Robnik, De Luca, Silverstein, Seljak, arXiv 2212.08549, and Robnik, Seljak, arXiv 2303.18221 (MCLMC); Robnik,
Cohn-Gordon, Seljak, arXiv 2503.01707 (adjusted); the step size by the variance of the energy error, arXiv 2412.08876;
the dual averaging of Hoffman, Gelman, JMLR 2014; many chains together, LAPS, arXiv 2601.16696.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastebm import rng
from fastebm.compiler import ScoreGradient
from fastebm.ops import metropolis_
from fastebm.ops.mclmc import RepeatedTurns
from fastebm.sampling.adaptation import ChainMoments, EnsembleSteps, ErrorSteps, check_target, free_dimensions
from fastebm.sampling.diagnostics.accumulators import mean_of_chains, ordered_dot
from fastebm.sampling.metropolis import MetropolisSampler, by_chain, key_increment, positive_schedules
from fastebm.sampling.observers import Observer
from fastebm.sampling.sampler import (
    Energy,
    EnergyState,
    Sampler,
    check_steps,
    constrained,
    copied,
    gradient_of,
    number_of_rows,
)
from fastebm.sampling.schedules import Schedule, as_schedule, evaluate, rows_to_try
from fastebm.sampling.state import SamplerState, StepInfo
from fastebm.sampling.underdamped import Mass, check_mass, inverse_masses, masses_of
from fastebm.scalars import as_count, as_int, as_real, shown

# The times of the five parts of a step: turn, move by half, turn, move by half, turn (McLachlan 1995, Omelyan 2003).
OUTER = 0.1931833275037836


def _check_state(state: SamplerState, columns: str, inverse_mass: Tensor | None) -> None:
    count, table = state.x.shape[0], state.schedule
    width = len(columns.split(", "))
    fits = table.dim() == 2 or (table.dim() == 3 and table.shape[1] == count)
    if table.dtype != torch.float32 or not fits or not len(table) or table.shape[-1] != width:
        raise ValueError(f"a chain's schedule is a float32 table of ({columns}), got {shown(table)}")
    if not bool(((table > 0) & table.isfinite()).all()):
        raise ValueError(f"a chain's schedule has positive numbers ({columns}), got others")
    elements = math.prod(state.x.shape[1:])
    if inverse_mass is not None and (
        inverse_mass.dtype != state.x.dtype
        or inverse_mass.dim() != 2
        or inverse_mass.shape[0] not in (1, count)
        or inverse_mass.shape[1] not in (1, elements)
    ):
        raise ValueError(
            f"a chain's inverse_mass must be {state.x.dtype} (1 or {count}, 1 or {elements}), got {shown(inverse_mass)}"
        )


@dataclass(frozen=True, eq=False)
class MicrocanonicalState(SamplerState):
    """All that the next step of `B` microcanonical chains depends on, besides the energy.

    The momentum of a state lacks the last turn of its step, which is made with the gradient of the next one.

    Attributes (besides those of `SamplerState`):
        schedule: float32 `(S, 3)` or `(S, B, 3)` rows of (step size, decoherence length, temperature).
        momentum: like `x`, of length 1 over each chain; None until the first step draws it.
        work: float64 `(B, 2)`, the changes of the kinetic energy so far, by last turns of steps and by others.
        pending: float64 `(B, 4)`, of the last step: the turn that is left of it, its temperature, the energy where it
            began, and the sum of `work` there.
        inverse_mass: `(1 or B, 1 or N)`, in `x`'s dtype; 0 for entries that are held.
        warmed_up: how many steps of a warm-up chose what is in the schedule, which is frozen since; 0 where none did.
    """

    momentum: Tensor | None = None
    work: Tensor | None = None
    pending: Tensor | None = None
    inverse_mass: Tensor | None = None
    warmed_up: int = 0

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """Momentum, work and what is pending, of a state that has them."""
        if self.momentum is None or self.work is None or self.pending is None:
            raise ValueError("this state has no momentum yet: a step draws it")
        return self.momentum, self.work, self.pending

    def check(self) -> None:
        super().check()
        _check_state(self, "step size, decoherence length, temperature", self.inverse_mass)
        if as_int("warmed_up", self.warmed_up) < 0:
            raise ValueError(f"a chain's warmed_up must not be negative, got {self.warmed_up}")
        count = self.x.shape[0]
        if len({value is None for value in (self.momentum, self.work, self.pending)}) > 1:
            raise ValueError("a chain's momentum, work and pending go together, got only some of them")
        kinds = {
            "momentum": (self.x.shape, self.x.dtype),
            "work": ((count, 2), torch.float64),
            "pending": ((count, 4), torch.float64),
        }
        for name, (shape, dtype) in kinds.items():
            value = getattr(self, name)
            if value is not None and (value.shape != shape or value.dtype != dtype):
                raise ValueError(f"a chain's {name} must be {dtype} {tuple(shape)}, got {shown(value)}")


@dataclass(frozen=True, eq=False)
class AdjustedState(EnergyState):
    """All that the next trajectory of `B` adjusted microcanonical chains depends on, besides the energy.

    Attributes (besides those of `EnergyState`):
        schedule: float32 `(S, 2)` or `(S, B, 2)` rows of (step size, temperature).
        inverse_mass: as in `MicrocanonicalState`.
    """

    inverse_mass: Tensor | None = None

    def check(self) -> None:
        super().check()
        _check_state(self, "step size, temperature", self.inverse_mass)


@dataclass(frozen=True, eq=False)
class MicrocanonicalInfo(StepInfo):
    """One step of `MCLMC`.

    Attributes (besides those of `StepInfo`):
        energy_error: float64 `(B,)`, over the temperature, of the step that led to `before`; 0 for the first, and NaN
            for a score.
    """

    energy_error: Tensor


class _Microcanonical(Sampler[Any]):
    """What both samplers share: options, starts, masses."""

    columns: tuple[str, ...]

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
        temperature: float | Tensor | Schedule,
        mass: Mass,
        dtype: torch.dtype | None,
        engine: str,
        reproducible: bool,
        needs_energy: str = "",
    ) -> None:
        self.gradient = gradient_of(energy, dtype, engine, reproducible, needs_energy=needs_energy)
        self.step_size, self.temperature = as_schedule(step_size), as_schedule(temperature)
        self.mass = check_mass(mass)
        given = self._schedules()  # a wrong range is found here rather than at the first chain
        positive_schedules(rows_to_try(*given.values()), **given)

    def _schedules(self) -> dict[str, Schedule]:
        """The schedules that were given, by name."""
        return {"step_size": self.step_size, "temperature": self.temperature}

    def _temperatures(self, num_steps: int) -> float | tuple[float, float] | None:
        found = evaluate(self.temperature, number_of_rows(num_steps, self.temperature))
        return None if found.dim() > 1 else (float(found[0]), float(found[-1]))

    def _shown(self, **options: Any) -> str:
        given = self._schedules() | options
        if isinstance(self.mass, Tensor) or self.mass != 1:
            given["mass"] = tuple(self.mass.shape) if isinstance(self.mass, Tensor) else self.mass
        return f"{type(self).__name__}({self.gradient!r}; {', '.join(f'{n}={v!r}' for n, v in given.items())})"

    def _start(
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
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The fields that both states have, and the mask as x's shape."""
        start_step, _ = check_steps(start_step, 0 if num_steps is None else num_steps)
        none_yet = torch.empty(0, 0, device="cpu")
        start = self._common(x0, seed, chain_ids, num_chains, start_step, conditions, none_yet, torch.contiguous_format)
        start["x"], held = constrained(start["x"], mask, known)
        x = start["x"]
        start["inverse_mass"] = inverse_masses(self.mass, x, held)
        dimensions = free_dimensions(x, start["inverse_mass"])
        if len(x) and int(dimensions.min()) < 2:
            raise ValueError(
                f"microcanonical chains need at least 2 dimensions that are not masked, got {int(dimensions.min())} of "
                f"x0 with shape {tuple(x.shape)}"
            )
        given = self._schedules()
        rows = number_of_rows(num_steps, *given.values())
        values = dict(zip(given, positive_schedules(rows, **given), strict=True))
        if "decoherence_length" in self.columns and "decoherence_length" not in values:
            heat, d = values["temperature"], dimensions.cpu()
            values["decoherence_length"] = ((heat[:, None] if len(d) != 1 and heat.dim() == 1 else heat) * d).sqrt()
        start["schedule"] = _table(x, *(values[name] for name in self.columns))
        return start, held


def _table(x: Tensor, *columns: Tensor) -> Tensor:
    """A float32 table of (S,) or (S, B) columns on x's device. Raises ValueError where B is not that of x."""
    widths = {c.shape[1] for c in columns if c.dim() == 2}
    if widths - {len(x)}:
        raise ValueError(f"a value for each of {min(widths)} chains was given, but there are {len(x)}")
    shape = (max(len(c) for c in columns), *widths)
    wide = [c[:, None] if widths and c.dim() == 1 else c for c in columns]
    return torch.stack([c.expand(shape) for c in wide], dim=-1).float().to(x.device)


# Unadjusted ---------------------------------------------------------------------------------------------------------


# Coefficients of the two passes of a step, (1, 4) or (B, 4), and its temperature, (1,) or (B,). The first one's closing
# is the turn that is left of the step before, and put in its place.
_Turns = tuple[Tensor, Tensor, Tensor]


def _turns(rows: Tensor, dimensions: Tensor) -> _Turns:
    """Those of (1, 3) or (B, 3) of (step size, decoherence length, temperature)."""
    h, length, temperature = rows.double().expand(len(rows) if len(dimensions) == 1 else len(dimensions), 3).unbind(-1)
    refresh = (torch.expm1(2 * h / length) / dimensions).sqrt()
    turn, zero = OUTER * h / temperature, torch.zeros_like(h)
    outer = torch.stack((turn, refresh, turn, h / 2), dim=-1)
    middle = torch.stack((zero, zero, (1 - 2 * OUTER) * h / temperature, h / 2), dim=-1)
    return outer, middle, temperature


class MCLMC(_Microcanonical):
    """Microcanonical Langevin Monte Carlo without a test: `p(x) ~ exp(-E(x) / T)` up to an error set by the step size.

    The field's choice for many dimensions, where tests would need ever shorter steps. A step costs two evaluations of
    the gradient. `warm_up` finds the step size at which the squared energy error of a step, over the dimensions,
    averages 5e-4.

    Args:
        energy: as `Langevin` takes it. A score alone serves for `sample`, not for `warm_up`.
        step_size: the length of a step's path, which is long beside that of other samplers, about a quarter of the
            root of the dimensions times the scale of x; a positive number, a schedule, or a tensor with one for each
            chain. `warm_up` starts from it, wherever it is.
        decoherence_length: the path over which the momentum is forgotten, likewise; None for the root of the
            dimensions times T, right where x has scale 1, and measured by `warm_up`.
        temperature: T, as `step_size`.
        mass: a positive number, or a tensor that broadcasts to one sample or has a row for each chain, `(B, 1, ...)`.
            The inverse of an entry's variance is best.
        dtype, engine, reproducible: passed to `energy_gradient`.

    Raises ValueError or TypeError for options out of range.

    Example:
        >>> import torch, fastebm
        >>> normal = fastebm.MCLMC(lambda x: 0.5 * x.square().sum(1), step_size=2.0)
        >>> x = normal.sample(torch.zeros(1000, 20), num_steps=50, seed=1)
        >>> bool((x.std() - 1).abs() < 0.02)
        True
    """

    state_type = MicrocanonicalState
    columns = ("step_size", "decoherence_length", "temperature")

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
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
        start, _ = self._start(x0, seed, chain_ids, num_chains, start_step, num_steps, mask, known, conditions)
        return MicrocanonicalState(**start)

    def _started(self, state: MicrocanonicalState) -> MicrocanonicalState:
        """The state with a momentum, which is drawn where it is missing."""
        if state.momentum is not None:
            return state
        x, count = state.x, state.x.shape[0]
        momentum, work = torch.zeros_like(x), x.new_zeros(count, 2, dtype=torch.float64)
        draw = work.new_tensor([[0.0, 1.0, 0.0, 0.0]])
        # The gradient is not read. The first step's refresh has the same noise, and so changes nothing.
        RepeatedTurns(x, momentum, work, state.key, state.chain_ids, state.inverse_mass)(torch.zeros_like(x), draw)
        # At an infinite temperature, no step has no energy error.
        pending = work.new_tensor([0.0, math.inf, 0.0, 0.0]).repeat(count, 1)
        return replace(state, momentum=momentum, work=work, pending=pending)

    def _updater(
        self, state: MicrocanonicalState, current: Callable[[], _Turns]
    ) -> Callable[[bool], tuple[Tensor, Tensor, Tensor]]:
        """A function that takes a step of a started state in place: (energy and gradient before it, energy error of the
        step before). The last two are there where `errors` asks for them, as it must at the last step."""
        x, (u, work, pending) = state.x, state.kept
        left, heat, energy, total = pending.unbind(1)
        one = key_increment(state.key)
        turn = RepeatedTurns(x, u, work, state.key, state.chain_ids, state.inverse_mass)
        last: _Turns | None = None

        def update(errors: bool) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal last
            turns = outer, middle, temperature = current()
            if turns is not last:
                outer = torch.cat((left[:, None], outer.expand(len(x), 4)[:, 1:]), dim=1)
            found, gradient = self.gradient(x, state.conditions)
            begun, error = work[:, 1].clone() if errors else work, energy
            turn(gradient, outer)
            if errors:
                begun += work[:, 0]
                error = (found.double() - energy) / heat + (begun - total)
                if isinstance(self.gradient, ScoreGradient):
                    error.fill_(math.nan)
                total.copy_(begun)
                gradient = gradient.clone()  # the engine may write the next one to the same memory
            energy.copy_(found)
            if turns is not last:
                left.copy_(turns[0][:, 2])
                heat.copy_(temperature)
                last = turns
            _, second = self.gradient(x, state.conditions)
            turn(second, middle)
            state.key.add_(one)
            return energy, gradient, error

        return update

    @torch.no_grad()
    def step(self, state: MicrocanonicalState) -> tuple[MicrocanonicalState, MicrocanonicalInfo]:
        """One step. `state` is left as it was."""
        check_steps(self.own_state(state).step, 1)
        with self.gradient.chain():
            before = state.x
            after = self._started(copied(state))
            energy, gradient, error = self._updater(after, self._current(after))(True)
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
            state = self._started(state)
            update = self._updater(state, self._current(state))
            for done in range(1, num_steps + 1):
                energy, _, _ = update(done == num_steps)
                for observe in observers:
                    observe(done, state.x, energy)
            self.gradient.leave_soon()
        return replace(state, step=state.step + num_steps)

    def _current(self, state: MicrocanonicalState) -> Callable[[], _Turns]:
        """A function that gives the turns of the row that the key stands at; the same object where there is one row."""
        dimensions = free_dimensions(state.x, state.inverse_mass)
        table = state.schedule if state.schedule.dim() == 3 else state.schedule[:, None]
        if len(table) == 1:
            only = _turns(table[0], dimensions)
            return lambda: only
        return lambda: _turns(table.index_select(0, state.key[2:].clamp(max=len(table) - 1))[0], dimensions)

    @torch.no_grad()
    def warm_up(
        self,
        state: MicrocanonicalState,
        num_steps: int,
        *,
        target: float = 5e-4,
        pooled: bool = False,
        mass: Literal["given", "diagonal"] = "given",
    ) -> MicrocanonicalState:
        """The state after `num_steps` steps that adapt the step size, and the decoherence length where none was given.

        What was found is in the state's schedule, and frozen. Samples count from here on:
        `sampler.advance(sampler.warm_up(state, 500), 1000)`.

        A chain whose step fails goes back to where that began, with half the step size.

        Args:
            num_steps: at least 20; some hundred are sensible.
            target: the energy-error variance per dimension, the mean of (energy error / T)^2 / d of a step; smaller
                means less bias and shorter steps, which go with its sixth root.
            pooled: one step size for all chains, by the average of their errors. Chains then depend on each other:
                without it, each has its own, and the bits of a chain don't depend on the others.
            mass: "diagonal" sets masses to the inverse variances of all chains' states in the second eighth of the
                steps, which the batch decides too.

        The decoherence length becomes the root of the sum of variances, times masses, of each chain's states in the
        second quarter of the steps; of all chains' where `pooled`.

        Raises ValueError or TypeError for options out of range, schedules that change along the chain, and scores.
        """
        target = check_target(target)
        gradient_of(self.gradient, None, "auto", True, needs_energy="warm_up")
        num_steps = self.check_warm_up(state, num_steps, mass)
        with self.gradient.chain():
            state = self._warm_up_(copied(state), num_steps, target, pooled, mass == "diagonal")
            self.gradient.leave_soon()
        return replace(state, step=state.step + num_steps, warmed_up=state.warmed_up + num_steps)

    def _warm_up_(
        self, state: MicrocanonicalState, num_steps: int, target: float, pooled: bool, diagonal: bool
    ) -> MicrocanonicalState:
        state = self._started(state)
        x, momentum, count = state.x, state.kept[0], state.x.shape[0]
        dimensions = free_dimensions(x, state.inverse_mass)
        h, length, temperature = (c.expand(count) for c in state.schedule[0].double().reshape(-1, 3).unbind(-1))
        turns = self._current(state)()

        def current() -> _Turns:
            return turns

        update = self._updater(state, current)
        sizes, moments = ErrorSteps(target, dimensions, pooled, h, num_steps), ChainMoments.of(x)
        skipped = torch.ones(count, dtype=torch.bool, device=x.device)
        before, of_last = (x, momentum), h
        for done in range(1, num_steps + 1):
            now, taken = (x.clone(), momentum.clone()), sizes.h
            _, _, error = update(True)
            lost = sizes.add(error, of_last, skipped)
            of_last = taken
            by_chain = lost.reshape(-1, *(1,) * (x.dim() - 1))
            for tensor, earlier in zip((x, momentum), before, strict=True):
                torch.where(by_chain, earlier, tensor, out=tensor)
            before, skipped = now, lost
            if done <= num_steps // 2:
                moments.add(x)
            if done == num_steps // 8:
                moments = ChainMoments.of(x)
            if done == num_steps // 4:
                if diagonal:
                    state = self._with_variances(state, moments.variance())
                    update = self._updater(state, current)
                    sizes.h = 0.25 * (dimensions * temperature).sqrt()
                moments = ChainMoments.of(x)
            if done == num_steps // 2 and self.decoherence_length is None:
                length = _root_of_variances(moments, state.inverse_mass, pooled).expand(count)
            row = torch.stack((sizes.h.expand(count), length, temperature), dim=-1).float()
            turns = _turns(row, dimensions)
            state = replace(state, schedule=row[None])
        return state

    def _with_variances(self, state: MicrocanonicalState, variance: Tensor) -> MicrocanonicalState:
        """The state with masses that are the inverse of these variances, `(N,)`, where anything moved."""
        inverse_mass = torch.where(variance > 0, variance, 1.0).to(state.x.dtype)[None]
        if state.inverse_mass is not None:
            inverse_mass = torch.where(state.inverse_mass == 0, 0.0, inverse_mass)
        return replace(state, inverse_mass=inverse_mass.contiguous())


def _root_of_variances(moments: ChainMoments, inverse_mass: Tensor | None, pooled: bool) -> Tensor:
    """The root of the sum of variances over inverse masses, float64: of each chain (B,), or of all (1,)."""
    if pooled:
        variances = moments.variance()[None]
    else:
        variances = moments.squares / max(1, moments.count - 1)
    weights = torch.ones_like(variances)
    if inverse_mass is not None:
        weights = torch.where(inverse_mass == 0, 0.0, 1 / inverse_mass.double())[: len(variances)].expand_as(variances)
    found = ordered_dot(variances, weights).sqrt()
    return torch.where((found > 0) & found.isfinite(), found, 1.0)


# Adjusted -----------------------------------------------------------------------------------------------------------


class AdjustedMCLMC(_Microcanonical, MetropolisSampler[AdjustedState]):
    """Metropolis-adjusted microcanonical sampling (MAMS): samples `p(x) ~ exp(-E(x) / T)` exactly.

    A step draws a fresh momentum of uniform direction, follows the microcanonical integrator for `trajectory_steps`
    steps, and accepts the end by the error of the total energy; else x stays. It costs twice `trajectory_steps`
    evaluations of the energy's gradient. Aim at 0.9 accepted: see `warm_up`, or `warm_up_ensemble` for many chains.

    Args:
        energy: as `Langevin` takes it; a score alone can't be tested.
        step_size: the length of the path of one step of the integrator, as `MCLMC`'s.
        trajectory_steps: steps in a trajectory, the same for all chains, which run side by side. A path of about the
            root of the dimensions times the scale of x is best.
        temperature: T, a positive number, a schedule, or a tensor with one for each chain.
        mass: a positive number, or a tensor that broadcasts to one sample or has a row for each chain, `(B, 1, ...)`.
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

    state_type = AdjustedState
    columns = ("step_size", "temperature")
    target_acceptance = 0.9

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
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
        start, held = self._start(x0, seed, chain_ids, num_chains, start_step, num_steps, mask, known, conditions)
        return AdjustedState(**start, mask=held)

    def _table_of(self, state: AdjustedState, steps: Tensor) -> Tensor:
        return torch.stack((steps, state.schedule[0, :, 1].double()), dim=-1).float()[None]

    def _with_variances(self, state: AdjustedState, variance: Tensor) -> AdjustedState:
        return replace(state, inverse_mass=masses_of(state, variance))

    @torch.no_grad()
    def warm_up_ensemble(
        self,
        state: AdjustedState,
        num_unadjusted: int,
        num_steps: int,
        *,
        target_acceptance: float | None = None,
    ) -> AdjustedState:
        """The state after a warm-up of many chains of one target together, unadjusted first, as LAPS has it.

        In the first phase the chains move as those of `MCLMC`, without a test that would hold them where they started.
        Their step size and decoherence length follow from where all of them stand: large steps while they are far from
        equipartition, smaller ones as they arrive. An eighth, a fourth, half and all of its steps through, the inverse
        masses become the root of the variance of all chains' states over that of their gradients. The second phase is
        `warm_up` with `pooled=True`: one step size, which aims at the acceptance. Masses and step size are in the
        state, frozen, and samples count from here on.

        What all chains have in common depends on which there are, so that this batch has to be warmed up as a whole;
        sums have one order, and the bits don't depend on the number of threads. From then on, chains may be split.

        Args:
            num_unadjusted: steps of the first phase, of two evaluations of the gradient; at least 20, some hundred are
                sensible. Their step size begins with the state's.
            num_steps: trajectories of the second phase, at least 20.
            target_acceptance: as in `warm_up`.

        Raises ValueError or TypeError for options out of range, fewer than two chains, and schedules that change along
        the chain.
        """
        num_unadjusted = as_count("num_unadjusted", num_unadjusted, 20)
        num_steps = self.check_warm_up(state, num_steps)
        check_steps(state.step, num_unadjusted + num_steps)
        if len(state.x) < 2:
            raise ValueError("an ensemble is warmed up by what its chains have in common: it needs two or more, got 1")
        with self.gradient.chain():
            state = self._unadjusted(state, num_unadjusted)
            state = self.warm_up(state, num_steps, target_acceptance=target_acceptance, pooled=True)
            self.gradient.leave_soon()
        return state

    def _unadjusted(self, state: AdjustedState, num_steps: int) -> AdjustedState:
        """The state after the first phase, whose step size is that of its end in the coordinates of the new masses."""
        plain = MCLMC(self.gradient, 1.0)
        given, heat = (c.double() for c in by_chain(state)[0].unbind(-1))
        start = replace(copied(state), schedule=by_chain(state))
        moving = plain._started(
            MicrocanonicalState(
                *(start.x, start.key, start.chain_ids, start.schedule, start.step),
                conditions=start.conditions,
                inverse_mass=start.inverse_mass,
            )
        )
        x, momentum = moving.x, moving.kept[0]
        steps = EnsembleSteps(x, moving.inverse_mass, heat, mean_of_chains(given).reshape(1))

        def row() -> _Turns:
            columns = steps.h.expand(len(x)), steps.length.expand(len(x)), heat
            return _turns(torch.stack(columns, dim=-1), steps.dimensions)

        turns = row()

        def current() -> _Turns:
            return turns

        update = plain._updater(moving, current)
        skipped = torch.ones(len(x), dtype=torch.bool, device=x.device)
        before, of_last = (x, momentum), steps.h
        windows = [max(1, num_steps * k // 8) for k in (1, 2, 4, 8)]
        for done in range(1, num_steps + 1):
            now, taken = (x.clone(), momentum.clone()), steps.h
            _, gradient, error = update(True)
            lost = steps.add(now[0], gradient, error, of_last, skipped)
            of_last = taken
            by_row = lost.reshape(-1, *(1,) * (x.dim() - 1))
            for tensor, earlier, judged in zip((x, momentum), before, now, strict=True):
                # Nothing tells whether the last step failed: it is not kept.
                torch.where(by_row, earlier, judged if done == num_steps else tensor, out=tensor)
            before, skipped = now, lost
            if done in windows:
                masses = masses_of(state, steps.scales())
                if done == num_steps:
                    break
                moving = replace(moving, inverse_mass=masses)
                update = plain._updater(moving, current)
                steps.take_masses(masses)
            turns = row()
        return replace(
            state,
            x=x,
            key=moving.key,
            step=state.step + num_steps,
            schedule=self._table_of(start, steps.h.expand(len(x))),
            inverse_mass=masses,
            warmed_up=state.warmed_up + num_steps,
            energy=None,
            gradient=None,
        )

    def _updater(self, state: AdjustedState) -> Callable[[], tuple[Tensor, Tensor]]:
        energy, gradient = state.kept
        one, count = key_increment(state.key), state.x.shape[0]
        x, momentum = torch.empty_like(state.x), torch.empty_like(state.x)
        work = x.new_empty(count, 2, dtype=torch.float64)
        turn = RepeatedTurns(x, momentum, work, state.key, state.chain_ids, state.inverse_mass)

        def update() -> tuple[Tensor, Tensor]:
            row = state.schedule.index_select(0, state.key[2:].clamp(max=len(state.schedule) - 1))[0].double()
            h, temperature = row.reshape(-1, 2).unbind(-1)
            if self.jitter:
                u = torch.ops.fastebm.uniform(
                    (count, 1), state.key, state.chain_ids, int(rng.Stream.TRAJECTORY_LENGTH), torch.float32
                )
                h = h * (1 + self.jitter * (2 * u[:, 0].double() - 1))
            zero, outer, inner = torch.zeros_like(h), OUTER * h / temperature, (1 - 2 * OUTER) * h / temperature
            # Of the start with its draw, the middle of a step, between two steps, and the end.
            start, middle, between, end = (
                torch.stack(parts, dim=-1)
                for parts in (
                    (zero, zero + 1, outer, h / 2),
                    (zero, zero, inner, h / 2),
                    (zero, zero, 2 * outer, h / 2),
                    (outer, zero, zero, zero),
                )
            )
            x.copy_(state.x)
            momentum.zero_()
            work.zero_()
            turn(gradient, start)
            for k in range(1, self.trajectory_steps + 1):
                turn(self._energy_gradient(state, x)[1], middle)
                found, slope = self._energy_gradient(state, x)
                turn(slope, end if k == self.trajectory_steps else between)
            log_ratio = -((found.double() - energy.double()) / temperature + (work[:, 0] + work[:, 1]))
            accepted = metropolis_(
                state.x, energy, gradient, x, found, slope, log_ratio, key=state.key, chain_ids=state.chain_ids
            )
            state.key.add_(one)
            return accepted, log_ratio

        return update


__all__ = ["MCLMC", "AdjustedMCLMC", "AdjustedState", "MicrocanonicalInfo", "MicrocanonicalState"]
