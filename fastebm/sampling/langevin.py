"""Langevin chains at a fixed energy: `x' = clamp(x - step_size * clip(grad E(x)) + noise_std * noise)`.

The update is one fused operator, `fastebm::langevin_step`; this file keeps the loop around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from fastebm import rng
from fastebm.compiler import EnergyGradient, energy_gradient
from fastebm.ops import CALL_STEPS, advance_chain, prefer_fused_chain
from fastebm.sampling.graphs import ChainGraphs, Update
from fastebm.sampling.observers import Observer, all_deferrable, checking_finite, progress_bar, trajectory_recorder
from fastebm.sampling.schedules import Constant, Schedule, as_schedule, evaluate, table
from fastebm.sampling.state import ChainState, StepInfo

Energy = nn.Module | Callable[[Tensor], Tensor] | EnergyGradient
Callback = Callable[[int, Tensor, StepInfo], None]
DataTerm = tuple[Tensor, float | Schedule] | tuple[Tensor, float | Schedule, float]


class LangevinOptions(TypedDict, total=False):
    """The optional arguments of `Langevin`, for samplers that are made of it."""

    clamp: tuple[float | None, float | None] | None
    grad_clip: float | None
    grad_norm_clip: float | None
    dtype: torch.dtype | None
    engine: str


class Langevin:
    """Langevin sampler of an energy `E(x) -> (B,)`, low meaning real: `init`, `step` on explicit state, and `sample`.

    `step_size` and `noise_std` are independent, since published recipes untie them; `from_epsilon(epsilon)` gives the pair
    of temperature 1, and `temperature` the implied one.

    Args:
        energy: an `nn.Module` or function that returns one energy a sample, or a ready `EnergyGradient`.
        step_size: positive number or schedule.
        noise_std: number or schedule, not negative; 0 draws no noise.
        clamp: `(low, high)`, imposed after every update; either may be None.
        grad_clip: largest magnitude of a gradient's entry.
        grad_norm_clip: largest norm of a sample's gradient; not together with `grad_clip`.
        dtype, engine: passed to `energy_gradient`.

    Raises ValueError or TypeError for options out of range.

    Example:
        >>> import torch, fastebm
        >>> normal = fastebm.Langevin(lambda x: 0.5 * x.square().sum(1), **fastebm.schedules.from_epsilon(0.5))
        >>> x = normal.sample(torch.zeros(1000, 2), num_steps=50, seed=1)
        >>> bool((x.std(0) - 1).abs().max() < 0.1)
        True
    """

    def __init__(
        self,
        energy: Energy,
        step_size: float | Schedule,
        noise_std: float | Schedule,
        *,
        clamp: tuple[float | None, float | None] | None = None,
        grad_clip: float | None = None,
        grad_norm_clip: float | None = None,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
    ) -> None:
        if isinstance(energy, EnergyGradient):
            if dtype is not None or engine != "auto":
                raise ValueError(
                    "dtype and engine are options of energy_gradient; this energy is an EnergyGradient already"
                )
            self.gradient = energy
        else:
            self.gradient = energy_gradient(energy, dtype=dtype, engine=engine)
        self.step_size = as_schedule(step_size)
        self.noise_std = as_schedule(noise_std)
        table(self.step_size, self.noise_std, 2)  # a wrong range is found here rather than at the first chain
        self.clamp = _checked_clamp(clamp)
        if grad_clip is not None and grad_norm_clip is not None:
            raise ValueError("give grad_clip (by value) or grad_norm_clip (by a sample's norm), not both")
        for name, bound in (("grad_clip", grad_clip), ("grad_norm_clip", grad_norm_clip)):
            if bound is not None and not bound > 0:
                raise ValueError(f"{name} must be positive, got {bound}")
        self.grad_clip = grad_clip
        self.grad_norm_clip = grad_norm_clip
        self._graphs = ChainGraphs()

    def __repr__(self) -> str:
        start, end = self.temperature(2).tolist()
        temperature = f"{start:.3g}" if start == end else f"{start:.3g} to {end:.3g}"
        options = {"step_size": repr(self.step_size), "noise_std": repr(self.noise_std)}
        if self.clamp != (None, None):
            options["clamp"] = str(self.clamp)
        for name, bound in (("grad_clip", self.grad_clip), ("grad_norm_clip", self.grad_norm_clip)):
            if bound is not None:
                options[name] = f"{bound:g}"
        listed = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"Langevin({self.gradient!r}; {listed}; temperature {temperature})"

    def temperature(self, num_steps: int = 1) -> Tensor:
        """The implied temperature `T = noise_std**2 / (2 * step_size)` of each of `num_steps` updates, float64 `(num_steps,)`.

        Small steps at constant `T` sample `p(x) ~ exp(-E(x) / T)`.
        """
        return evaluate(self.noise_std, num_steps).square() / (2 * evaluate(self.step_size, num_steps))

    @torch.no_grad()
    def init(
        self,
        x0: Tensor,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        start_step: int = 0,
        num_steps: int | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        data_term: DataTerm | None = None,
    ) -> ChainState:
        """The state from which chains start.

        Args:
            x0: where they start, `(B, ...)`, float32 or float64; it is copied.
            seed: of all noise; None draws one from torch's default generator.
            chain_ids: the id of the first chain, or int64 ids `(B,)`. Equal seed, id and step mean equal noise.
            start_step: the step of the random numbers at which the chain starts; a continued chain counts on.
            num_steps: the length of the chain; needed where a schedule is not constant.
            mask, known: pin `x` to `known` where `mask` is set, from the start on; both broadcast to `x0`.
            data_term: `(target, weight)` or `(target, weight, hinge)`: adds `weight * (x - target)` to the (clipped)
                gradient of the samples with `||x - target||**2 > hinge`; the weight is a number or a schedule, not
                negative.
        """
        _check_x0(x0)
        check_steps(start_step, 0 if num_steps is None else num_steps)
        if data_term is not None and (not isinstance(data_term, tuple) or len(data_term) not in (2, 3)):
            raise TypeError("data_term is a tuple (target, weight) or (target, weight, hinge)")
        rows = self._rows(num_steps, None if data_term is None else data_term[1])
        device = x0.device
        x = x0.detach().clone()
        if (mask is None) != (known is None):
            raise ValueError(f"mask and known come together, got only {'known' if mask is None else 'mask'}")
        if mask is not None and known is not None:
            mask = _broadcast_like(x, "mask", mask, torch.bool)
            known = _broadcast_like(x, "known", known, x.dtype)
            x = torch.where(mask, known, x)
        target, weight, hinge = (None, None, 0.0) if data_term is None else _checked_data_term(x, data_term, rows)
        return ChainState(
            x=x,
            key=rng.make_key(rng.draw_seed() if seed is None else seed, start_step, device=device),
            chain_ids=rng.make_chain_ids(chain_ids, x.shape[0], device=device),
            schedule=table(self.step_size, self.noise_std, rows).to(device),
            step=start_step,
            mask=mask,
            known=known,
            data_target=target,
            data_term_weight=weight,
            data_term_hinge=hinge,
        )

    @torch.no_grad()
    def step(self, state: ChainState) -> tuple[ChainState, StepInfo]:
        """One update. The given state is left as it was.

        Outside of `with sampler.gradient.chain():` every call reads the weights anew.
        """
        check_steps(state.step, 1)
        energy, gradient = self.gradient(state.x)
        x = torch.ops.fastebm.langevin_step(state.x, gradient, *self._arguments(state))
        after = replace(state, x=x, key=state.key + _key_increment(state.key), step=state.step + 1)
        return after, StepInfo(energy, gradient, state.x, x)

    def advance(self, state: ChainState, num_steps: int, *, check: bool = True) -> ChainState:
        """`num_steps` updates on from `state`, which is left as it was: `step` repeated, bit for bit, without its copies.

        Raises FloatingPointError where energies or states are not finite, unless `check` is False.
        """
        state = replace(state, x=state.x.clone(), key=state.key.clone())
        with checking_finite(state, check) as observers:
            return self.advance_(state, num_steps, observers)

    @torch.no_grad()
    def advance_(self, state: ChainState, num_steps: int, observers: Sequence[Observer] = ()) -> ChainState:
        """`advance` in place: overwrites the `x` and `key` of `state`, which is of no use afterwards.

        Nothing here syncs with the host, and energies that are not finite are the caller's business. Where nobody reads
        every state, updates after the first one are replayed from CUDA graphs on a CUDA device, and on the CPU small
        images get many updates in one call.
        """
        check_steps(state.step, num_steps)
        update = self._update(_key_increment(state.key))
        with self.gradient.chain():
            done = 0
            while done < num_steps:
                # The first update reads the weights; from then on all that moves is on the device.
                if done == 1 and all_deferrable(observers):
                    done += self._advance_blocks_(update, state, num_steps - done, observers, done)
                    if done == num_steps:
                        break
                energies = update(state)
                done += 1
                for observe in observers:
                    observe(done, state.x, energies)
        return replace(state, step=state.step + num_steps)

    def advance_in_batches_(self, state: ChainState, num_steps: int, batch_size: int | None, check: bool) -> None:
        """`advance_` of so many chains at a time; `batch_size` and `check` as in `sample`."""
        for first, last in batch_slices(state.x.shape[0], batch_size):
            part = state.rows(first, last)
            with checking_finite(part, check) as watch:
                self.advance_(part, num_steps, watch)

    @torch.no_grad()
    def sample_segment(
        self,
        x: Tensor,
        schedule: Tensor,
        begin: int,
        num_steps: int,
        seed: int,
        chain_ids: int | Tensor,
        *,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        data_term: DataTerm | None = None,
        batch_size: int | None = None,
        check: bool = True,
    ) -> Tensor:
        """Updates number `begin` and on, `num_steps` of them, of a longer chain whose whole `schedule` is given, from `x`.

        The table, (steps of all, 2) of (step size, noise std), stands in for the sampler's own schedules. Others as in
        `sample`.
        """
        state = self.init(
            x, seed, chain_ids, start_step=begin, num_steps=num_steps, mask=mask, known=known, data_term=data_term
        )
        key = rng.make_key(seed, begin, begin, device=x.device)
        state = replace(state, schedule=schedule.to(x.device), key=key)
        self.advance_in_batches_(state, num_steps, batch_size, check)
        return state.x

    def _update(self, one: Tensor) -> Update:
        """The function that moves a state on in place, its key by `one`, and returns the energies before."""

        def update(state: ChainState) -> Tensor:
            energies, gradient = self.gradient(state.x)
            torch.ops.fastebm.langevin_step_(state.x, gradient, *self._arguments(state))
            state.key.add_(one)
            return energies

        return update

    def _advance_blocks_(
        self, update: Update, state: ChainState, num_steps: int, observers: Sequence[Observer], done: int
    ) -> int:
        """Moves `state` on by blocks of updates, `done` of which went before; returns how many it did: all, or none."""
        if state.x.is_cuda:
            return self._graphs.advance_(self.gradient, update, state, num_steps, observers, done)
        program = self.gradient.compiled_program(state.x)
        if program is None or not (program.takes(state.x) and prefer_fused_chain(state.x)):
            return 0
        for first in range(0, num_steps, CALL_STEPS):
            block = min(CALL_STEPS, num_steps - first)
            energies = advance_chain(state.x, program, block, *self._arguments(state))
            for i, of_update in enumerate(energies.unbind()):
                for observe in observers:
                    observe(done + first + i + 1, state.x, of_update)
        return num_steps

    def run_with_callback(
        self,
        state: ChainState,
        num_steps: int,
        callback: Callback,
        *,
        thin: int = 1,
        observers: Sequence[Observer] = (),
    ) -> ChainState:
        """`num_steps` updates by `step`, with `callback(k, x, info)` after every `thin`-th, which may keep both."""
        with self.gradient.chain():
            for done in range(1, num_steps + 1):
                state, info = self.step(state)
                for observe in observers:
                    observe(done, state.x, info.energy)
                if done % thin == 0:
                    callback(done, state.x, info)
        return state

    @torch.no_grad()
    def sample(
        self,
        x0: Tensor,
        num_steps: int,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        start_step: int = 0,
        thin: int = 1,
        keep: Literal["last", "trajectory"] | Callback = "last",
        batch_size: int | None = None,
        progress: bool = False,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        data_term: DataTerm | None = None,
        check: bool = True,
    ) -> Tensor:
        """Runs chains of `num_steps` updates from `x0`, which is left as it was, and returns where they end, like `x0`.

        Args:
            x0, seed, chain_ids, start_step, mask, known, data_term: as in `init`.
            num_steps: the number of updates, 0 or more; schedules stretch over it.
            thin: the distance in updates between kept states or calls.
            keep: "last"; or "trajectory" for the start and every `thin`-th state after it,
                `(1 + num_steps // thin, B, ...)`; or a function called as `callback(k, x, info)` after every `thin`-th
                update `k`, batch after batch; it may keep `x` and the `StepInfo` but not change them.
            batch_size: runs this many chains at a time; ids, noise and order are those of a single batch.
            progress: shows a bar with the mean energy.
            check: raises FloatingPointError where an energy or a final state was not finite (one sync a batch, at
                its end); False leaves that to the caller.
        """
        if thin < 1:
            raise ValueError(f"thin must be at least 1, got {thin}")
        if not callable(keep) and keep not in ("last", "trajectory"):
            raise ValueError(f'keep is "last", "trajectory" or a function, got {keep!r}')
        check_steps(start_step, num_steps)
        state = self.init(
            x0, seed, chain_ids, start_step=start_step, num_steps=num_steps, mask=mask, known=known, data_term=data_term
        )
        x = state.x
        frames = x.new_empty((1 + num_steps // thin, *x.shape)) if keep == "trajectory" else None
        batches = list(batch_slices(x.shape[0], batch_size))
        with progress_bar(num_steps * len(batches), progress) as bar:
            for first, last in batches:
                part = state.rows(first, last)
                with checking_finite(part, check) as watch:
                    observers = [*watch, *bar]
                    if callable(keep):
                        x[first:last] = self.run_with_callback(part, num_steps, keep, thin=thin, observers=observers).x
                        continue
                    if frames is not None:
                        frames[0, first:last] = part.x
                        observers.append(trajectory_recorder(frames[:, first:last], thin))
                    self.advance_(part, num_steps, observers)
        return x if frames is None else frames

    def _arguments(self, state: ChainState) -> tuple[Any, ...]:
        """The operator's arguments after `x` and the gradient, in its order."""
        return (
            state.schedule,
            state.key,
            state.chain_ids,
            *self.clamp,
            self.grad_clip,
            self.grad_norm_clip,
            state.mask,
            state.known,
            state.data_target,
            state.data_term_weight,
            state.data_term_hinge,
        )

    def _rows(self, num_steps: int | None, data_term_weight: float | Schedule | None) -> int:
        """How many rows the tables of a chain of `num_steps` updates need: one, if all its schedules are constant."""
        schedules = [self.step_size, self.noise_std] + (
            [] if data_term_weight is None else [as_schedule(data_term_weight)]
        )
        varying = [schedule for schedule in schedules if not isinstance(schedule, Constant)]
        if not varying:
            return 1
        if num_steps is None:
            raise ValueError(
                f"a schedule that is not constant needs the length of the chain: give steps (got {varying[0]!r})"
            )
        return max(num_steps, 1)


def batch_slices(count: int, batch_size: int | None) -> Iterator[tuple[int, int]]:
    """The (first, last + 1) rows of consecutive batches of at most `batch_size`."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    size = max(count, 1) if batch_size is None else batch_size
    return ((first, min(first + size, count)) for first in range(0, max(count, 1), size))


def _key_increment(key: Tensor) -> Tensor:
    """What an update adds to (seed, step, schedule index): (0, 1, 1), made on the device as a copy to it would sync."""
    return torch.arange(3, device=key.device).clamp_(max=1)


def _check_x0(x0: Tensor) -> None:
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
    if x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"chains keep their state in float32 or float64, got x0 in {x0.dtype}; gradients may be lower (see dtype)"
        )
    if x0.dim() < 1:
        raise ValueError("x0 must have shape (chains, ...), got a tensor without dimensions")


def check_steps(start_step: int, num_steps: int) -> None:
    """Steps count up to 2**32: beyond it noise would come again."""
    if num_steps < 0:
        raise ValueError(f"steps must not be negative, got {num_steps}")
    if not 0 <= start_step <= start_step + num_steps <= rng.MAX_STEP:
        raise ValueError(
            f"steps {start_step} to {start_step + num_steps} of the random numbers leave the range 0 to 2**32"
        )


def _checked_clamp(clamp: tuple[float | None, float | None] | None) -> tuple[float | None, float | None]:
    if clamp is None:
        return None, None
    if len(clamp) != 2:
        raise ValueError(f"clamp is a pair (low, high), got {clamp!r}")
    low, high = clamp
    if not (-math.inf if low is None else low) <= (math.inf if high is None else high):
        raise ValueError(f"clamp needs low <= high, got {clamp!r}")
    return low, high


def _broadcast_like(x: Tensor, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `value` as `dtype`, broadcast to `x`'s shape and laid out as `x` is."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, x0 on {x.device}")
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to x0's shape {tuple(x.shape)}, got {tuple(value.shape)}")
    return torch.empty_like(x, dtype=dtype).copy_(value)


def _checked_data_term(x: Tensor, data_term: DataTerm, rows: int) -> tuple[Tensor, Tensor, float]:
    """The target, the table of weights and the hinge of `data_term`."""
    target, weight, *rest = data_term
    hinge = float(rest[0]) if rest else 0.0
    weights = evaluate(weight, rows)
    if not (math.isfinite(hinge) and hinge >= 0) or (weights < 0).any():
        raise ValueError(f"data_term needs weight >= 0 and a finite hinge >= 0, got weight {weight!r}, hinge {hinge}")
    return _broadcast_like(x, "the target of data_term", target, x.dtype), weights.float().to(x.device), hinge
