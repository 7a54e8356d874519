"""Underdamped Langevin dynamics: positions and velocities with friction, by the BAOAB and OBABO splittings.

Source: Leimkuhler and Matthews, "Rational construction of stochastic numerical methods for molecular sampling",
Applied Mathematics Research eXpress 2013; Bussi and Parrinello, "Accurate sampling using Langevin dynamics", Physical
Review E 2007 (OBABO).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastebm import rng
from fastebm.ops import LaneSampler, SamplerOptions, baoab_step_, obabo_step_
from fastebm.ops.normal import rounded_sqrt
from fastebm.sampling.adaptation import ChainMoments, ErrorSteps, check_target, free_dimensions
from fastebm.sampling.diagnostics.accumulators import ordered_dot
from fastebm.sampling.metropolis import (
    Box,
    EnergySampler,
    by_chain,
    check_box,
    check_inside,
    key_increment,
    positive_schedules,
    walls_of,
)
from fastebm.sampling.observers import Observer
from fastebm.sampling.sampler import (
    Energy,
    EnergyState,
    check_steps,
    constrained,
    copied,
    gradient_of,
    number_of_rows,
)
from fastebm.sampling.schedules import PerChain, Schedule, as_schedule, rows_to_try
from fastebm.scalars import as_real, shown

Mass = float | Tensor


@dataclass(frozen=True, eq=False)
class VelocityState(EnergyState):
    """The state of samplers with velocities.

    Attributes (besides those of `EnergyState`):
        schedule: float32 `(S, 3)` or `(S, B, 3)` rows of (step size, decay of the velocity, noise std).
        velocity: x's shape and dtype.
        inverse_mass: `(1, N)`, `(B, 1)` or `(B, N)` for chains of N numbers; None for masses of 1.
        temperature: float32 `(S,)` or `(S, B)`.
    """

    velocity: Tensor | None = None
    inverse_mass: Tensor | None = None
    temperature: Tensor | None = None

    @property
    def moving(self) -> Tensor:
        """The velocities, of a state that keeps them."""
        if self.velocity is None:
            raise ValueError("this state keeps no velocities")
        return self.velocity

    @property
    def temperatures(self) -> Tensor:
        """The table of temperatures, of a state that has one."""
        if self.temperature is None:
            raise ValueError("this state has no temperatures")
        return self.temperature

    @classmethod
    def _tables(cls) -> dict[str, int]:
        return {"schedule": 3, "temperature": 2}

    def check(self) -> None:
        super().check()
        if self.schedule.shape[-1] != 3:
            raise ValueError(f"a chain's schedule has rows of 3 numbers, got {tuple(self.schedule.shape)}")
        if self.velocity is not None and (self.velocity.shape, self.velocity.dtype) != (self.x.shape, self.x.dtype):
            raise ValueError(f"a chain's velocity must be like x, got {shown(self.velocity)}")
        count, width = self.x.shape[0], math.prod(self.x.shape[1:])
        heat = self.temperature
        if heat is not None and not (
            heat.dtype == torch.float32
            and (heat.dim() == 1 or (heat.dim() == 2 and heat.shape[1] == count))
            and len(heat)
            and bool(((heat >= 0) & heat.isfinite()).all())
        ):
            raise ValueError(f"a chain's temperature is a float32 table (S,) or (S, {count}) >= 0, got {shown(heat)}")
        for name, dims in (("inverse_mass", ((1, count), (1, width))),):
            value = getattr(self, name)
            if value is not None and not (
                value.dim() == 2
                and value.dtype == self.x.dtype
                and all(n in d for n, d in zip(value.shape, dims, strict=True))
            ):
                raise ValueError(
                    f"a chain's {name} must broadcast to ({count}, {width}) in x's dtype, got {shown(value)}"
                )


def inverse_masses(mass: Mass, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """1 / mass for states like x, None where all are 1; zero where a mask holds an entry fixed.

    Raises ValueError or TypeError for masses that are not positive or don't broadcast to one sample or one for each
    chain.
    """
    count, width = x.shape[0], math.prod(x.shape[1:])
    if isinstance(mask, Tensor):
        whole = inverse_masses(mass, x, None)
        free = (~mask).reshape(count, width).to(x.dtype)
        return free if whole is None else whole * free
    if not isinstance(mass, Tensor) or mass.dim() == 0:
        number = as_real("mass", mass)
        return None if number == 1 else x.new_full((1, 1), 1 / number)
    view = mass.detach().to(x.device, x.dtype)
    if mass.shape == x.shape:
        return 1 / view.reshape(count, width)
    if mass.shape == (count, *(1,) * (x.dim() - 1)):
        return 1 / view.reshape(count, 1)
    sample = torch.Size(x.shape[1:])
    try:
        fits = torch.broadcast_shapes(mass.shape, sample) == sample and mass.dim() <= len(sample)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mass must be a number, broadcast to one sample {tuple(sample)}, or have a row for each chain, "
            f"({count}, {', '.join('1' * (x.dim() - 1))}), got {tuple(mass.shape)}"
        )
    return 1 / view.expand(sample).reshape(1, width)


def masses_of(state: EnergyState, variance: Tensor) -> Tensor:
    """Inverse masses that are the variances `(N,)` of all chains' states, zero where a mask holds an entry fixed."""
    # Where nothing moved there is no scale to learn.
    inverse_mass = torch.where(variance > 0, variance, 1.0).to(state.x.dtype)[None]
    if state.mask is not None:
        inverse_mass = inverse_mass * (~state.mask).reshape(len(state.x), -1)
    return inverse_mass.contiguous()


def check_mass(mass: Any) -> Mass:
    """A mass. Raises TypeError or ValueError for what is not finite and positive."""
    if not isinstance(mass, Tensor):
        mass = as_real("mass", mass)
        fits = math.isfinite(mass) and mass > 0
    else:
        if not mass.is_floating_point() or mass.is_meta:
            raise TypeError(f"mass must be of floating point numbers, got {shown(mass)}")
        mass = mass.detach().clone()
        fits = bool(((mass > 0) & mass.isfinite()).all())
    if not fits:
        raise ValueError(
            f"mass must be finite and positive, got {mass if not isinstance(mass, Tensor) else float(mass.min())}"
        )
    return mass


def fresh_velocity(state: VelocityState, stream: rng.Stream = rng.Stream.REFRESH) -> Tensor:
    """Velocities of the temperature in the state's row, from a stream at its key."""
    x = state.x
    noise = torch.ops.fastebm.normal(tuple(x.shape), state.key, state.chain_ids, int(stream), x.dtype)
    return scaled_noise(state, noise)


def scaled_noise(state: VelocityState, noise: Tensor) -> Tensor:
    """Standard normal noise times sqrt(T / mass)."""
    count = state.x.shape[0]
    scale = rounded_sqrt(row_of(state, state.temperatures).to(state.x.dtype)).reshape(-1, 1)
    if state.inverse_mass is not None:
        scale = scale * rounded_sqrt(state.inverse_mass)
    return (noise.reshape(count, math.prod(state.x.shape[1:])) * scale).reshape(state.x.shape)


def row_of(state: VelocityState, table: Tensor) -> Tensor:
    """The row of a table at the state's key, `(1, ...)`, without a wait for the device."""
    return table[state.key[2].clamp(max=table.shape[0] - 1)][None]


class Underdamped(EnergySampler[VelocityState]):
    """Underdamped (kinetic) Langevin dynamics of `p(x, v) ~ exp(-(E(x) + |v|^2 m / 2) / T)`, without a Metropolis test.

    A step of BAOAB kicks the velocity by half a step of the force, drifts half a step, mixes in fresh noise, drifts and
    kicks again; of OBABO it mixes half before and half after. One evaluation of the gradient a step. The error of
    averages is of second order in the step size; BAOAB's positions have none for a quadratic energy. Without friction
    both are the leapfrog integrator, to the bit.

    Args:
        energy: as `Langevin` takes it, or a score.
        step_size: the time of a step, a positive number, a schedule, or a tensor with one for each chain.
        friction: in 1 / time, not negative, likewise. The velocity forgets itself within 1 / friction.
        temperature: T, likewise.
        mass: a positive number, or a tensor that broadcasts to one sample or has a row for each chain, `(B, 1, ...)`.
        scheme: "baoab" or "obabo".
        box: `(low, high)`: trajectories are reflected at its walls.
        dtype, engine, reproducible: passed to `energy_gradient`.

    Raises ValueError or TypeError for options out of range.

    Example:
        >>> import torch, fastebm
        >>> normal = fastebm.Underdamped(lambda x: 0.5 * x.square().sum(1), step_size=0.5, friction=1.0)
        >>> x = normal.sample(torch.zeros(4000, 2), num_steps=50, seed=1)
        >>> bool((x.std(0) - 1).abs().max() < 0.05)
        True
    """

    state_type = VelocityState

    def __init__(
        self,
        energy: Energy,
        step_size: float | Tensor | Schedule,
        friction: float | Tensor | Schedule,
        *,
        temperature: float | Tensor | Schedule = 1.0,
        mass: Mass = 1.0,
        scheme: Literal["baoab", "obabo"] = "baoab",
        box: Box | None = None,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        reproducible: bool = True,
    ) -> None:
        self.gradient = gradient_of(energy, dtype, engine, reproducible)
        if scheme not in ("baoab", "obabo"):
            raise ValueError(f'scheme is "baoab" or "obabo", got {scheme!r}')
        self.scheme = scheme
        self.step_size, self.friction = as_schedule(step_size), as_schedule(friction)
        self.temperature, self.mass, self.box = as_schedule(temperature), check_mass(mass), check_box(box)
        schedules = self.step_size, self.friction, self.temperature
        self._tables(rows_to_try(*schedules))

    def __repr__(self) -> str:
        mass = f"{self.mass:g}" if isinstance(self.mass, float) else f"masses {tuple(self.mass.shape)}"
        return (
            f"Underdamped({self.gradient!r}; {self.scheme}, step_size={self.step_size!r}, friction={self.friction!r}, "
            f"temperature={self.temperature!r}, mass={mass}{'' if self.box is None else f', box={self.box}'})"
        )

    def _tables(self, rows: int) -> tuple[Tensor, Tensor]:
        """The tables of (step size, decay, noise std) and of temperatures."""
        return kinetic_tables(rows, self.step_size, self.friction, self.temperature, halves=self.scheme == "obabo")

    @torch.no_grad()
    def init(
        self,
        x0: Tensor,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        velocity: Tensor | None = None,
        num_chains: int | None = None,
        start_step: int = 0,
        num_steps: int | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        conditions: Sequence[Tensor] = (),
    ) -> VelocityState:
        """The state from which chains start; arguments as in `Langevin.init`, and `velocity`, x0's shape, by default
        drawn at the first temperature."""
        start_step, _ = check_steps(start_step, 0 if num_steps is None else num_steps)
        table, temperatures = self._tables(number_of_rows(num_steps, self.step_size, self.friction, self.temperature))
        start = self._common(x0, seed, chain_ids, num_chains, start_step, conditions, table, torch.contiguous_format)
        state = with_masses(start, mask, known, self.mass, self.box, temperatures)
        return replace(state, velocity=fresh_velocity(state) if velocity is None else check_velocity(velocity, state))

    def _step_(
        self, state: VelocityState, gradient: Tensor, close: bool, opens: bool, work: Tensor | None = None
    ) -> None:
        take = baoab_step_ if self.scheme == "baoab" else obabo_step_
        low, high = walls_of(self.box)
        take(
            state.x,
            state.moving,
            gradient,
            schedule=state.schedule,
            key=state.key,
            chain_ids=state.chain_ids,
            inverse_mass=state.inverse_mass,
            low=low,
            high=high,
            work=work,
            close=close,
            open=opens,
        )

    def _lane_options(self, state: VelocityState) -> SamplerOptions:
        kind = LaneSampler.BAOAB if self.scheme == "baoab" else LaneSampler.OBABO
        low, high = walls_of(self.box)
        address = state.schedule, state.key, state.chain_ids
        return SamplerOptions(int(kind), 1, *address, None, state.inverse_mass, state.mask, None, low, high)

    def _singly(self, state: VelocityState, num_steps: int, observers: Sequence[Observer], done: int) -> None:
        if num_steps == 0:
            return
        energy, gradient = state.kept
        one = key_increment(state.key)
        self._step_(state, gradient, close=False, opens=True)
        for i in range(1, num_steps + 1):
            state.key.add_(one)
            before = energy.clone() if observers else energy
            found, slope = self._energy_gradient(state, state.x)
            energy.copy_(found)
            for observe in observers:
                observe(done + i, state.x, before)
            # The closing half of this step and the opening half of the next one are one pass.
            self._step_(state, slope, close=True, opens=i < num_steps)
        gradient.copy_(slope)

    def _updater(self, state: VelocityState) -> Callable[[], None]:
        return lambda: self._singly(state, 1, (), 0)

    def _step_error_(self, state: VelocityState) -> Tensor:
        """Takes a step of a table of one row in place. Returns its error of the total energy, float64 `(B,)`: what
        changed besides the heat of its noise."""
        energy, gradient = state.kept
        before, h = energy.to(torch.float64, copy=True), by_chain(state)[0, :, 0].double()
        work = torch.zeros_like(before)
        if self.scheme == "baoab":  # whose operator counts the heat, too
            first, counted = _kick_work(state, gradient, h, 1), None
        else:
            first, counted = torch.zeros_like(work), work
        self._step_(state, gradient, close=False, opens=True, work=counted)
        state.key.add_(key_increment(state.key))
        found, slope = self._energy_gradient(state, state.x)
        self._step_(state, slope, close=True, opens=False, work=counted)
        last = _kick_work(state, slope, h, -1) if counted is None else work
        energy.copy_(found)
        gradient.copy_(slope)
        return energy.double() - before + (first + last)

    @torch.no_grad()
    def warm_up(
        self,
        state: VelocityState,
        num_steps: int,
        *,
        target: float = 5e-4,
        pooled: bool = False,
        mass: Literal["given", "diagonal"] = "given",
    ) -> VelocityState:
        """The state after `num_steps` steps that adapt the step size, which is frozen from then on.

        Each chain finds its own, at which the squared error of the total energy in a step, over the squared temperature
        and the dimensions, averages `target` (arXiv 2412.08876). Friction stays as it is. A chain whose step fails goes
        back to where that began, with half the step size.

        Args:
            num_steps: at least 20; some hundred are sensible.
            target: smaller means less bias and shorter steps, which go with its sixth root. A normal distribution of
                scale 1 gets steps of `(16 target)^(1/6)`, 0.45 for 5e-4, where the variance of "obabo" is 5 % off. The
                noise between its kicks makes those of "baoab" shorter, where friction is large.
            pooled: one step size for all chains, by the average of their errors; the batch then matters.
            mass: "diagonal" sets masses to the inverse variances of all chains' states in the second eighth of the
                steps, which the batch decides too.

        Raises ValueError or TypeError for options out of range, schedules that change along the chain, a temperature of
        0, and scores.
        """
        target = check_target(target)
        gradient_of(self.gradient, None, "auto", True, needs_energy="warm_up")
        num_steps = self.check_warm_up(state, num_steps, mass)
        heat = state.temperatures[0].double().expand(len(state.x))
        if not bool((heat > 0).all()):
            raise ValueError("a warm-up needs temperatures above 0, at which energy errors are measured")
        wide = by_chain(state)
        given = replace(state, schedule=wide)
        state = replace(copied(state), schedule=wide.clone(), warmed_up=state.warmed_up + num_steps)
        dimensions = free_dimensions(state.x, state.inverse_mass).clamp(min=1)
        sizes = ErrorSteps(target, dimensions, pooled, wide[0, :, 0].double(), num_steps)
        none_skipped = torch.zeros(len(state.x), dtype=torch.bool, device=state.x.device)
        with self.gradient.chain():
            state = self._evaluate(state)
            moments = ChainMoments.of(state.x)
            for done in range(1, num_steps + 1):
                moving = state.x, state.moving, *state.kept
                before = [tensor.clone() for tensor in moving]
                lost = sizes.add(self._step_error_(state) / heat, sizes.h, none_skipped)
                for tensor, earlier in zip(moving, before, strict=True):
                    tensor.copy_(torch.where(lost.reshape(-1, *(1,) * (tensor.dim() - 1)), earlier, tensor))
                if mass == "diagonal" and done <= num_steps // 4:
                    moments.add(state.x)
                    if done == num_steps // 8:
                        moments = ChainMoments.of(state.x)
                    if done == num_steps // 4:
                        state = replace(state, inverse_mass=masses_of(state, moments.variance()))
                        state = replace(state, velocity=fresh_velocity(state))
                        sizes.h = torch.full_like(sizes.h, (16 * target) ** (1 / 6))
                state.schedule.copy_(self._table_of(given, sizes.h.expand(len(state.x))))
            self.gradient.leave_soon()
        return replace(state, step=state.step + num_steps)

    def _table_of(self, state: VelocityState, steps: Tensor) -> Tensor:
        return table_of_steps(state, steps, self.friction, halves=self.scheme == "obabo")


def _kick_work(state: VelocityState, gradient: Tensor, h: Tensor, sign: int) -> Tensor:
    """What a half kick by h / 2 changes of the kinetic energy, from the velocity before it (1) or behind it (-1)."""
    force = gradient.double().reshape(len(gradient), -1)
    moved = force if state.inverse_mass is None else force * state.inverse_mass
    return -(h / 2) * ordered_dot(state.moving, gradient) + sign * (h.square() / 8) * ordered_dot(force, moved)


def kinetic_tables(
    rows: int,
    step_size: Schedule,
    friction: Schedule,
    temperature: Schedule,
    halves: bool,
) -> tuple[Tensor, Tensor]:
    """float32 tables of (step size, decay, noise std) and of temperatures; `halves` where noise comes in two halves."""
    h, rate, heat = positive_schedules(
        rows, step_size=step_size, friction_or_zero=friction, temperature_or_zero=temperature
    )
    exponent = -rate * h * (0.5 if halves else 1.0)
    decay = exponent.exp()
    # 1 - decay^2, which expm1 keeps for small friction.
    noise_std = (-torch.expm1(2 * exponent) * heat).sqrt()
    return torch.stack((h, decay, noise_std), dim=-1).float(), heat.float()


def table_of_steps(state: VelocityState, steps: Tensor, friction: Schedule, halves: bool) -> Tensor:
    """The schedule `(1, B, 3)` of these step sizes, float64 `(B,)`, at the temperatures and the friction of `state`,
    whose schedule is `(1, B, 3)` too."""
    heat = state.temperatures[0].double().expand(len(steps)).cpu()
    if isinstance(friction, PerChain):  # of all chains, of which the state may have some
        h, decay, noise_std = state.schedule[0].double().cpu().unbind(-1)
        # Where the decay is near 1, its distance from 1 is kept by the noise.
        near_one = (decay > 0.5) & (heat > 0)
        exponent = torch.where(near_one, torch.log1p(-noise_std.square() / heat) / 2, decay.clamp(min=1e-300).log())
        friction = PerChain(-exponent.clamp(max=0) / (h * (0.5 if halves else 1.0)))
    return kinetic_tables(1, PerChain(steps.cpu()), friction, PerChain(heat), halves)[0].to(steps.device)


def with_masses(
    start: dict[str, Any],
    mask: Tensor | None,
    known: Tensor | None,
    mass: Mass,
    box: Box | None,
    temperatures: Tensor,
) -> VelocityState:
    """The state of `start` with its known entries set and its masses, without velocities."""
    start["x"], held = constrained(start["x"], mask, known)
    x = start["x"]
    check_inside(x, box)
    inverse_mass = inverse_masses(mass, x, held)
    return VelocityState(**start, mask=held, inverse_mass=inverse_mass, temperature=temperatures.to(x.device))


def check_velocity(velocity: Any, state: VelocityState) -> Tensor:
    """A copy of given velocities, zero where a mask holds x. Raises ValueError for another shape than x's."""
    x, held = state.x, state.mask
    if not isinstance(velocity, Tensor) or velocity.shape != x.shape or not velocity.is_floating_point():
        raise ValueError(f"velocity must be a tensor of x0's shape {tuple(x.shape)}, got {shown(velocity)}")
    given = velocity.detach().to(x.device, x.dtype, copy=True, memory_format=torch.contiguous_format)
    return given if held is None else given.masked_fill_(held, 0)
