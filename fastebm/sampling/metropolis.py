"""What samplers with a Metropolis step share: the kept energy and gradient, temperatures, walls, the step's report."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fastebm.ops import CompiledLanes, SamplerOptions, advance_sampler, sampler_steps
from fastebm.sampling.adaptation import ChainMoments, DualAveraging
from fastebm.sampling.observers import Observer, all_deferrable, observe_block
from fastebm.sampling.sampler import (
    Energy,
    EnergyState,
    Gradient,
    Sampler,
    check_steps,
    constrained,
    copied,
    gradient_of,
    key_increment,
    number_of_rows,
)
from fastebm.sampling.schedules import Schedule, as_schedule, evaluate, evaluate_together, rows_to_try
from fastebm.sampling.state import StepInfo
from fastebm.scalars import as_real, shown

Box = tuple[float, float]
State = TypeVar("State", bound=EnergyState)
# An energy error beyond this many units of temperature is a trajectory that left the region where its integrator works.
DIVERGENCE = 1000.0


@dataclass(frozen=True, eq=False)
class MetropolisInfo(StepInfo):
    """One step with a Metropolis test.

    Attributes (besides those of `StepInfo`, whose energy and gradient are those before the step):
        accepted: bool `(B,)`.
        log_ratio: float64 `(B,)`, the logarithm of the ratio that was compared with a uniform number; NaN or -inf where
            the proposal's energy was not finite.
    """

    accepted: Tensor
    log_ratio: Tensor

    @property
    def acceptance_probability(self) -> Tensor:
        """`min(1, exp(log_ratio))`, float64 `(B,)`; 0 where the ratio is NaN."""
        return self.log_ratio.clamp(max=0).exp().nan_to_num(nan=0.0)

    @property
    def energy_error(self) -> Tensor:
        """`-log_ratio`, float64 `(B,)`: how far the proposal was from keeping its energy, over the temperature; with
        MALA's walls 0 for one beyond both, which is rejected for that alone."""
        return -self.log_ratio

    @property
    def diverged(self) -> Tensor:
        """bool `(B,)`: the proposal was not finite, or its energy error was beyond 1000 units of temperature. Such a
        chain stays where it was."""
        return ~(self.energy_error < DIVERGENCE)


class WalledMetropolisInfo(MetropolisInfo):
    """A step whose log_ratio is -inf for a proposal that does not lie between the walls."""

    @property
    def energy_error(self) -> Tensor:
        error = -self.log_ratio
        return error.masked_fill(error == torch.inf, 0.0)


class EnergySampler(Sampler[State]):
    """A sampler that keeps the energy and the gradient at x between its steps."""

    state_type = EnergyState
    box: Box | None = None
    _info_type: type[MetropolisInfo] = MetropolisInfo

    def _evaluate(self, state: State) -> State:
        """The state with its energy and gradient, which are evaluated where they are missing."""
        if state.energy is not None:
            return state
        energy, gradient = self._energy_gradient(state, state.x)
        return replace(state, energy=energy.clone(), gradient=gradient.clone())

    def _energy_gradient(self, state: State, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and gradient at x; entries that a mask holds fixed have gradient zero."""
        energy, gradient = self.gradient(x, state.conditions)
        if state.mask is not None:
            gradient = gradient.masked_fill(state.mask, 0)
        return energy, gradient.contiguous()

    @abstractmethod
    def _updater(self, state: State) -> Callable[[], tuple[Tensor, Tensor] | None]:
        """A function that takes one step of `state` in place; it returns accepted and log_ratio of a test."""

    @torch.no_grad()
    def step(self, state: State) -> tuple[State, StepInfo]:
        """One step. `state` is left as it was.

        Energy and gradient are taken from the state, where it has them: for other weights, give it with both None.
        """
        check_steps(self.own_state(state).step, 1, self.key_steps)
        with self.gradient.chain():
            before = self._evaluate(state)
            after = copied(before)
            tested = self._updater(after)()
            self.gradient.leave_soon()
        common = *before.kept, before.x, after.x
        info = StepInfo(*common) if tested is None else self._info_type(*common, *tested)
        return replace(after, step=after.step + self.key_steps), info

    @torch.no_grad()
    def advance_(self, state: State, num_steps: int, observers: Sequence[Observer] = ()) -> State:
        _, num_steps = check_steps(state.step, num_steps, self.key_steps)
        with self.gradient.chain():
            state = self._evaluate(state)
            # The first step reads the weights; see Langevin.advance_.
            done = min(1, num_steps)
            self._singly(state, done, observers, 0)
            if num_steps > 1 and self.gradient.unsettled(state.x, state.conditions):
                self._singly(state, 1, observers, 1)
                done = 2
            if done < num_steps and all_deferrable(observers):
                done += self._in_blocks(state, num_steps - done, observers, done)
            self._singly(state, num_steps - done, observers, done)
            self.gradient.leave_soon()
        return replace(state, step=state.step + num_steps * self.key_steps)

    temperature: Schedule

    def _temperatures(self, num_steps: int) -> float | tuple[float, float] | None:
        if self.box is not None:  # walls, like clamps, break the identity that a temperature is judged by
            return None
        found = evaluate(self.temperature, number_of_rows(num_steps, self.temperature))
        return None if found.dim() > 1 else (float(found[0]), float(found[-1]))

    @abstractmethod
    def _table_of(self, state: State, steps: Tensor) -> Tensor:
        """The schedule `(1, B, n)` of these step sizes, float64 `(B,)`, at the temperatures of `state`."""

    def _with_variances(self, state: State, variance: Tensor) -> State:
        """The state with masses that are the inverse of these variances, `(N,)`."""
        raise TypeError(f"{type(self).__name__} has no masses")

    def _singly(self, state: State, num_steps: int, observers: Sequence[Observer], done: int) -> None:
        """Takes steps one by one in place, after `done` earlier ones."""
        update, (energy, _) = self._updater(state), state.kept
        for i in range(1, num_steps + 1):
            before = energy.clone() if observers else energy
            update()
            for observe in observers:
                observe(done + i, state.x, before)

    def _lane_options(self, state: State) -> SamplerOptions | None:
        """The options of whole chains in one call of a lane program; None where this sampler has no such call."""
        return None

    def _in_blocks(self, state: State, num_steps: int, observers: Sequence[Observer], done: int) -> int:
        """Takes steps in place by calls of many, after `done` earlier ones. Returns how many it took: all, or none."""
        program = self.gradient.compiled_program(state.x, state.conditions)
        options = self._lane_options(state)
        if options is None or not isinstance(program, CompiledLanes):
            return 0
        at_once = sampler_steps(program, state.x, options.num_leapfrogs)
        if not at_once:
            return 0
        energy, gradient = state.kept
        velocity = getattr(state, "velocity", None)
        for first in range(0, num_steps, at_once):
            block = min(at_once, num_steps - first)
            steps = advance_sampler(program, state.x, energy, gradient, velocity, block, options)
            for observe in observers:
                observe_block(observe, done + first, state.x, steps.energies)
        return num_steps


class MetropolisSampler(EnergySampler[State]):
    """A sampler with a Metropolis test, whose acceptance a warm-up aims at."""

    target_acceptance: float

    @torch.no_grad()
    def warm_up(
        self,
        state: State,
        num_steps: int,
        *,
        target_acceptance: float | None = None,
        pooled: bool = False,
        mass: Literal["given", "diagonal"] = "given",
    ) -> State:
        """The state after `num_steps` steps in which step sizes were adapted; from then on they are frozen.

        Each chain gets a step size of its own by dual averaging, which depends on no other chain: its bits stay the
        same in any batch. Samples count from here on: `sampler.advance(sampler.warm_up(state, 500), 1000)`.

        Args:
            num_steps: at least 20.
            target_acceptance: the mean acceptance to aim at, in (0, 1); by default 0.574 for MALA, 0.8 for HMC and
                MALT, 0.9 for GHMC.
            pooled: one step size for all chains, from their mean acceptance; the batch then matters.
            mass: "diagonal" sets masses to the inverse variances of all chains' states in the middle of the warm-up,
                which the batch decides too; for samplers with masses.

        Raises ValueError or TypeError for options out of range, and schedules that change along the chain.
        """
        num_steps = self.check_warm_up(state, num_steps, mass)
        target = (
            self.target_acceptance if target_acceptance is None else as_real("target_acceptance", target_acceptance)
        )
        if not 0 < target < 1:
            raise ValueError(f"target_acceptance must be in (0, 1), got {target}")
        wide = by_chain(state)
        given = replace(state, schedule=wide)
        state = replace(copied(state), schedule=wide.clone(), warmed_up=state.warmed_up + num_steps)
        averaging = DualAveraging(state.schedule[0, :, 0].double(), target, pooled)
        first, last = (num_steps * 3 // 20, num_steps * 3 // 4) if mass == "diagonal" else (num_steps, num_steps)
        with self.gradient.chain():
            state = self._evaluate(state)
            moments = ChainMoments.of(state.x) if mass == "diagonal" else None
            update = self._updater(state)
            for done in range(1, num_steps + 1):
                tested = update()
                assert tested is not None
                chance = tested[1].clamp(max=0).exp().nan_to_num(nan=0.0)
                state.schedule.copy_(self._table_of(given, averaging.update(chance)))
                if moments is not None and first < done <= last:
                    moments.add(state.x)
                    if done == last:
                        state = self._with_variances(state, moments.variance())
                        update = self._updater(state)
                        averaging.restart()
            self.gradient.leave_soon()
        state.schedule.copy_(self._table_of(given, averaging.averaged()))
        return replace(state, step=state.step + num_steps * self.key_steps)


class PositionSampler(MetropolisSampler[EnergyState]):
    """A sampler with a Metropolis test whose state is x alone; its schedules are a step size and a temperature."""

    step_size: Schedule

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
        temperature: float | Tensor | Schedule,
        dtype: torch.dtype | None,
        engine: str,
        reproducible: bool,
    ) -> None:
        self.gradient = gradient_of(energy, dtype, engine, reproducible, needs_energy=type(self).__name__)
        self.step_size, self.temperature = as_schedule(step_size), as_schedule(temperature)
        self._table(rows_to_try(self.step_size, self.temperature))

    @abstractmethod
    def _table(self, rows: int) -> Tensor:
        """The schedule `(rows, n)` or `(rows, B, n)`, float32."""

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
    ) -> EnergyState:
        """The state from which chains start; arguments as in `Langevin.init`.

        With a mask, p is that of the free entries given the known ones.
        """
        start_step, _ = check_steps(start_step, 0 if num_steps is None else num_steps)
        table = self._table(number_of_rows(num_steps, self.step_size, self.temperature))
        start = self._common(x0, seed, chain_ids, num_chains, start_step, conditions, table, torch.contiguous_format)
        start["x"], held = constrained(start["x"], mask, known)
        check_inside(start["x"], self.box)
        return EnergyState(**start, mask=held)


def by_chain(state: EnergyState) -> Tensor:
    """The schedule of a state as `(S, B, n)`."""
    table = state.schedule
    return table if table.dim() == 3 else table[:, None].expand(-1, len(state.x), -1)


def check_box(box: Any) -> Box | None:
    """The walls of a box. Raises TypeError or ValueError for anything but finite numbers low < high."""
    if box is None:
        return None
    if not isinstance(box, tuple | list) or len(box) != 2:
        raise TypeError(f"box must be (low, high), got {shown(box)}")
    low, high = as_real("box's low", box[0]), as_real("box's high", box[1])
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"box must be finite numbers with low < high, got ({low}, {high})")
    return low, high


def walls_of(box: Box | None) -> tuple[float | None, float | None]:
    """The walls as operators take them."""
    return (None, None) if box is None else box


def check_inside(x: Tensor, box: Box | None) -> None:
    """Raises ValueError for starts outside of the box."""
    if box is not None and x.numel() and not bool(((x >= box[0]) & (x <= box[1])).all()):
        raise ValueError(f"x0 must lie inside of the box {box}, got {float(x.min()):g} to {float(x.max()):g}")


def positive_schedules(num_steps: int, **schedules: float | Tensor | Schedule) -> tuple[Tensor, ...]:
    """Schedules together, as float64 `(S,)` or `(S, B)`. Raises ValueError for one that is not positive in float32.

    One whose name ends in `_or_zero` may be 0.
    """
    values = evaluate_together(num_steps, *schedules.values())
    for name, value in zip(schedules, values, strict=True):
        rounded = value.float()
        plain = name.removesuffix("_or_zero")
        fits = rounded.isfinite() & ((rounded >= 0) if plain != name else (rounded > 0))
        if not bool(fits.all()):
            needed = "not negative" if plain != name else "positive"
            raise ValueError(f"{plain} must be finite and {needed} in float32, got {float(value[~fits][0])}")
    return values


__all__ = [
    "Box",
    "EnergySampler",
    "Gradient",
    "MetropolisInfo",
    "MetropolisSampler",
    "PositionSampler",
    "WalledMetropolisInfo",
    "by_chain",
    "check_box",
    "check_inside",
    "key_increment",
    "positive_schedules",
]
