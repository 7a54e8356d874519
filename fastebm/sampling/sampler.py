"""What all samplers share: starts of chains, batches of them, kept states, progress, the check that all is finite."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastebm import rng
from fastebm.compiler import EnergyGradient, ScoreGradient, as_conditions, energy_gradient, require_energy
from fastebm.distributed import shared_rows
from fastebm.ops.langevin import check_mask
from fastebm.ops.memory import check_dense
from fastebm.sampling.diagnostics import BatchedDiagnostics, Diagnostics, run_observed
from fastebm.sampling.observers import Observer, checking_finite, progress_bar, trajectory_recorder
from fastebm.sampling.schedules import Constant, PerChain, Schedule, as_schedule
from fastebm.sampling.state import SamplerState, StepInfo, copied
from fastebm.scalars import as_count, as_int, shown

Gradient = EnergyGradient | ScoreGradient
Energy = nn.Module | Callable[..., Tensor] | Gradient
Callback = Callable[[int, Tensor, StepInfo], None]
Projection = Callable[[Tensor], Tensor]
State = TypeVar("State", bound=SamplerState)


@dataclass(frozen=True, eq=False)
class EnergyState(SamplerState):
    """The state of samplers that keep the energy and the gradient at x, so that a step costs no more evaluations.

    Attributes (besides those of `SamplerState`):
        energy: `(B,)`, float32, or float64 for a float64 x; None until the first step evaluates it.
        gradient: x's shape and dtype; None likewise. Both belong to the weights that were read then: for other weights
            `dataclasses.replace(state, energy=None, gradient=None)`.
        mask: bool, x's shape; where it is True, x stays as it is.
        warmed_up: how many steps of a warm-up chose the step sizes in `schedule`, which is frozen since; 0 where none
            did.
    """

    energy: Tensor | None = None
    gradient: Tensor | None = None
    mask: Tensor | None = None
    warmed_up: int = 0

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """Energy and gradient, of a state that has them."""
        if self.energy is None or self.gradient is None:
            raise ValueError("this state has no energy and gradient yet: a step evaluates them")
        return self.energy, self.gradient

    def check(self) -> None:
        super().check()
        check_start(self.x)
        count = self.x.shape[0]
        if (self.energy is None) != (self.gradient is None):
            raise ValueError("a chain's energy and gradient go together, got only one of them")
        if self.energy is not None and self.energy.shape != (count,):
            raise ValueError(f"a chain's energy must have shape ({count},), got {tuple(self.energy.shape)}")
        if as_int("warmed_up", self.warmed_up) < 0:
            raise ValueError(f"a chain's warmed_up must not be negative, got {self.warmed_up}")
        for name in ("gradient", "mask"):
            value = getattr(self, name)
            if value is not None and value.shape != self.x.shape:
                raise ValueError(
                    f"a chain's {name} must have x's shape {tuple(self.x.shape)}, got {tuple(value.shape)}"
                )
        table = self.schedule
        if table.dtype != torch.float32 or table.dim() not in (2, 3) or not len(table):
            raise ValueError(f"a chain's schedule is a float32 table, got {shown(table)}")
        if table.dim() == 3 and table.shape[1] != count:
            raise ValueError(f"a chain's schedule has a column for each of {count} chains, got {tuple(table.shape)}")
        if not bool(table.isfinite().all()):
            raise ValueError("a chain's schedule must be finite")
        if not bool(((table[..., 0] > 0) & (table >= 0).all(-1)).all()):
            raise ValueError("a chain's schedule has positive numbers (those of friction may be 0), got others")
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ValueError(f"a chain's mask must be torch.bool, got {self.mask.dtype}")


class Sampler(ABC, Generic[State]):
    """The loop that samplers share. Each has `init`, `step` on explicit state, `advance` and `sample`.

    Several threads may use one sampler at the same time; see `EnergyGradient`.
    """

    gradient: Gradient
    state_type: type[SamplerState] = SamplerState
    """The class of the sampler's states."""
    # Steps of the random numbers that one step of the sampler takes.
    key_steps: int = 1

    @abstractmethod
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
    ) -> State:
        """The state from which chains start."""

    @abstractmethod
    def advance_(self, state: State, num_steps: int, observers: Sequence[Observer] = ()) -> State:
        """`advance` in place: overwrites the tensors of `state`, which must not be used afterwards."""

    @abstractmethod
    def step(self, state: State) -> tuple[State, StepInfo]:
        """One step. `state` is left as it was."""

    def load_state(self, saved: Mapping[str, Any], device: torch.device | str | None = None) -> State:
        """The state that `state.state_dict()` gave, on `device`; by default on the device of its `x`.

        A state that names no sampler, as those of older versions, is taken to be one of this sampler where its fields
        are. Raises ValueError for what is not a state of this sampler.
        """
        state = self.state_type.from_state_dict(saved, device)
        if state.sampler not in ("", type(self).__name__):
            raise ValueError(f"not the state of a chain of {type(self).__name__}: it is one of {state.sampler}")
        return replace(state, sampler=type(self).__name__)  # type: ignore[return-value]

    def own_state(self, state: State) -> State:
        """`state` itself. Raises TypeError for what is not a state of this sampler, such as the bare `x`."""
        if type(state) is not self.state_type:
            raise TypeError(
                f"{type(self).__name__} goes on from a {self.state_type.__name__}, as its init makes it, "
                f"got {shown(state)}"
            )
        if state.sampler not in ("", type(self).__name__):
            raise TypeError(f"{type(self).__name__} goes on from its own states, got one of {state.sampler}")
        return state

    def check_warm_up(self, state: State, num_steps: int, mass: str = "given") -> int:
        """The number of steps of a warm-up. Raises ValueError or TypeError where it can't work."""
        num_steps = as_count("num_steps", num_steps, 20)
        check_steps(self.own_state(state).step, num_steps, self.key_steps)
        if len(state.schedule) != 1:
            raise ValueError("a warm-up needs options that don't change along the chain, but this one has a schedule")
        if mass not in ("given", "diagonal"):
            raise ValueError(f'mass is "given" or "diagonal", got {mass!r}')
        if mass == "diagonal" and not hasattr(state, "inverse_mass"):
            raise TypeError(f"{type(self).__name__} has no masses")
        if not len(state.x):
            raise ValueError("a warm-up needs at least one chain, got none")
        return num_steps

    def advance(self, state: State, num_steps: int, *, check: bool = True) -> State:
        """The state `num_steps` steps after `state`, which is left as it was: the bits of `step`, without its copies.

        A state that keeps energies goes on from them; see `EnergyState` for energies whose weights have changed.

        Raises FloatingPointError where energies or states are not finite, unless `check` is False.
        """
        state = copied(self.own_state(state))
        with checking_finite(state, check) as observers:
            return self.advance_(state, num_steps, observers)

    def run_with_callback(
        self,
        state: State,
        num_steps: int,
        callback: Callback,
        *,
        thin: int = 1,
        observers: Sequence[Observer] = (),
    ) -> State:
        """`num_steps` steps by `step`, with `callback(k, x, info)` after every `thin`-th, which may keep both."""
        _, num_steps = check_steps(state.step, num_steps, self.key_steps)
        thin = as_count("thin", thin, 1)
        with self.gradient.chain():
            for done in range(1, num_steps + 1):
                state, info = self.step(state)
                for observe in observers:
                    observe(done, state.x, info.energy)
                if done % thin == 0:
                    callback(done, state.x, info)
            self.gradient.leave_soon()
        return state

    @torch.no_grad()
    def sample(
        self,
        x0: Tensor,
        num_steps: int,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        num_chains: int | None = None,
        start_step: int = 0,
        thin: int = 1,
        keep: Literal["last", "trajectory"] | Callback = "last",
        batch_size: int | None = None,
        progress: bool = False,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        conditions: Sequence[Tensor] = (),
        check: bool = True,
        diagnostics: Diagnostics | bool = False,
    ) -> Any:
        """Runs chains of `num_steps` steps from `x0` and returns the states at their ends, `(B, ...)` like `x0`.

        Args:
            x0, seed, chain_ids, num_chains, start_step, mask, known, conditions: as in `init`.
            num_steps: the number of steps, 0 or more; schedules stretch over it.
            thin: the distance in steps between kept states or calls.
            keep: "last"; or "trajectory" for the start and every `thin`-th state after it,
                `(1 + num_steps // thin, B, ...)`; or a function called as `callback(k, x, info)` after every `thin`-th
                step `k`, batch after batch; it may keep `x` and the `StepInfo` but not change them.
            batch_size: runs this many chains at a time; ids, noise and order are those of a single batch.
            progress: shows a bar with the mean energy.
            check: raises FloatingPointError where an energy or a final state was not finite (one sync for each batch,
                at its end); False leaves that to the caller.
            diagnostics: True, or `fastebm.diagnostics.Diagnostics` with options: then `(x, summary)` is returned, with
                a `ChainSummary` of all chains.
        """
        _, num_steps = check_steps(start_step, num_steps, self.key_steps)
        state = self.init(
            x0,
            seed,
            chain_ids,
            num_chains=num_chains,
            start_step=start_step,
            num_steps=num_steps,
            mask=mask,
            known=known,
            conditions=conditions,
        )
        return self.run(
            state,
            num_steps,
            thin=thin,
            keep=keep,
            batch_size=batch_size,
            progress=progress,
            check=check,
            diagnostics=diagnostics,
        )

    @torch.no_grad()
    def run(
        self,
        state: State,
        num_steps: int,
        *,
        thin: int = 1,
        keep: Literal["last", "trajectory"] | Callback = "last",
        batch_size: int | None = None,
        progress: bool = False,
        check: bool = True,
        diagnostics: Diagnostics | bool = False,
        **options: Any,
    ) -> Any:
        """`sample` from a state, whose tensors are overwritten; `options` go to each advance.

        What it returns is no state. To go on later, take `advance`, or `fastebm.diagnostics.run_observed`.
        """
        thin = as_count("thin", thin, 1)
        if not callable(keep) and keep not in ("last", "trajectory"):
            raise ValueError(f'keep is "last", "trajectory" or a function, got {keep!r}')
        x = self.own_state(state).x
        frames = x.new_empty((1 + num_steps // thin, *x.shape)) if keep == "trajectory" else None
        batch_slices(x.shape[0], batch_size, options.get("project"))  # raises
        watched = None
        if diagnostics is not False:
            energies = isinstance(self.gradient, EnergyGradient)
            watched = BatchedDiagnostics(diagnostics, num_steps, self._temperatures(num_steps), energies=energies)

        def run_batch(first: int, last: int, bar: Sequence[Observer]) -> None:
            part = state.rows(first, last)
            if callable(keep):
                part = replace(part, x=part.x.clone())  # a callback may keep it, and ends are written to the other
            with checking_finite(part, check) as watch:
                observers = [*watch, *bar]
                if watched is not None:
                    if frames is not None:
                        frames[0, first:last] = part.x
                        observers.append(trajectory_recorder(frames[:, first:last], thin))
                    given: dict[str, Any] = {"callback": keep, "thin": thin} if callable(keep) else {}
                    observer = watched.observer(first, last)
                    part = run_observed(self, part, num_steps, observer, observers, **given, **options)
                    x[first:last] = part.x
                    return
                if callable(keep):
                    part = self.run_with_callback(part, num_steps, keep, thin=thin, observers=observers, **options)
                    x[first:last] = part.x
                    return
                if frames is not None:
                    frames[0, first:last] = part.x
                    observers.append(trajectory_recorder(frames[:, first:last], thin))
                self.advance_(part, num_steps, observers, **options)

        def chains(rows: range) -> Tensor:
            batches = batch_slices(len(rows), batch_size)
            with progress_bar(num_steps * len(batches), progress) as bar:
                for first, last in batches:
                    run_batch(rows.start + first, rows.start + last, bar)
            return x[rows.start : rows.stop]

        # A trajectory has its chains in the second dimension, and whoever is told of chains is told of all of them.
        if keep == "last" and watched is None and options.get("project") is None:
            return shared_rows(x.shape[0], chains)
        chains(range(x.shape[0]))
        result = x if frames is None else frames
        return result if watched is None else (result, watched.summary())

    def _temperatures(self, num_steps: int) -> float | tuple[float, float] | None:
        """The temperature at the first and the last of so many steps; None where it is not one for all chains."""
        return None

    def _common(
        self,
        x0: Tensor,
        seed: int | None,
        chain_ids: int | Tensor,
        num_chains: int | None,
        start_step: int,
        conditions: Sequence[Tensor],
        schedule: Tensor,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> dict[str, Any]:
        """The fields of `SamplerState`. Raises ValueError or TypeError for starts and ids that don't fit."""
        x0 = repeat_start(check_start(x0), num_chains, "num_chains")
        if isinstance(chain_ids, Tensor) and chain_ids.dim() and chain_ids.shape != x0.shape[:1]:
            raise ValueError(
                f"chain_ids must hold one id a chain: x0 has {x0.shape[0]} starts, but chain_ids has shape "
                f"{tuple(chain_ids.shape)}; num_chains=N repeats a single start"
            )
        if schedule.dim() == 3 and schedule.shape[1] != x0.shape[0]:
            raise ValueError(f"a value for each of {schedule.shape[1]} chains was given, but there are {x0.shape[0]}")
        device = x0.device
        return {
            "x": x0.detach().clone(memory_format=memory_format),
            "key": rng.make_key(rng.draw_seed() if seed is None else seed, start_step, device=device),
            "chain_ids": rng.make_chain_ids(chain_ids, x0.shape[0], device=device),
            "schedule": schedule.to(device, copy=True),
            "step": start_step,
            "conditions": conditions_of(conditions, x0),
            "sampler": type(self).__name__,
        }


def gradient_of(
    energy: Energy, dtype: torch.dtype | None, engine: str, reproducible: bool, *, needs_energy: str = ""
) -> Gradient:
    """The gradient of an energy. Raises ValueError for options beside a ready one, and TypeError for a score where an
    energy is needed, by the sampler that `needs_energy` names."""
    if isinstance(energy, EnergyGradient | ScoreGradient):
        if dtype is not None or engine != "auto" or not reproducible:
            raise ValueError(
                f"dtype, engine and reproducible are options of energy_gradient; this energy is a "
                f"{type(energy).__name__} already"
            )
        return require_energy(energy, needs_energy) if needs_energy else energy
    return energy_gradient(energy, dtype=dtype, engine=engine, reproducible=reproducible)


def number_of_rows(num_steps: int | None, *schedules: float | Tensor | Schedule) -> int:
    """How many rows a table of `schedules` needs for `num_steps` updates: 1 if all of them are constant."""
    made = [as_schedule(schedule) for schedule in schedules]
    varying = [s for s in made if not isinstance(s, Constant) and not (isinstance(s, PerChain) and s.rows == 1)]
    if not varying:
        return 1
    if num_steps is None:
        raise ValueError(
            f"a schedule that is not constant needs the length of the chain: give num_steps (got {varying[0]!r})"
        )
    return max(as_count("num_steps", num_steps), 1)


def constrained(x: Tensor, mask: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x with its known entries set, and the mask with x's shape. Raises ValueError or TypeError as `init` says."""
    if (mask is None) != (known is None):
        raise ValueError(f"mask and known come together, got only {'known' if mask is None else 'mask'}")
    if mask is None or known is None:
        return x, None
    mask = check_mask(expand_to(x.shape, "mask", mask, x.device)).contiguous()
    return torch.where(mask, expand_image(x.shape, "known", known, x.device).to(x.dtype), x), mask


def batch_slices(count: int, batch_size: int | None, project: Projection | None = None) -> list[tuple[int, int]]:
    """The (first, last + 1) rows of consecutive batches of at most `batch_size`; at least one, which may be empty.

    Raises ValueError for a batch size below 1, and for several batches of chains with a projection.
    """
    size = max(count, 1) if batch_size is None else as_count("batch_size", batch_size, 1)
    if project is not None and size < count:
        raise ValueError(f"project acts on all {count} chains at once: batch_size must not be smaller, got {size}")
    return [(first, min(first + size, count)) for first in range(0, max(count, 1), size)]


def repeat_start(x0: Tensor, count: int | None, name: str) -> Tensor:
    """`x0` as the starts of `count` chains: a single one is repeated. Raises ValueError for any other number."""
    if count is None:
        return x0
    count = as_int(name, count)
    if count == len(x0):
        return x0
    if not 0 <= count < rng.MAX_CHAIN:
        raise ValueError(f"{name} must be in [0, 2^56), got {count}")
    if len(x0) != 1:
        raise ValueError(f"{name} is {count}, but x0 has {len(x0)} starts: only a single one can be repeated")
    return x0.expand(count, *x0.shape[1:])


def key_increment(key: Tensor) -> Tensor:
    """What an update adds to (seed, step, schedule index): (0, 1, 1), made on the device as a copy to it would sync."""
    return torch.arange(3, device=key.device).clamp_(max=1)


def check_start(x0: Any) -> Tensor:
    """`x0` itself. Raises TypeError or ValueError for what chains can't start from."""
    if not isinstance(x0, Tensor):
        several = "; fastebm.Joint makes one of several" if isinstance(x0, tuple | list | dict) else ""
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}{several}")
    if x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"chains keep their state in float32 or float64, got x0 in {x0.dtype}; gradients may be lower (see dtype)"
        )
    check_dense("x0", x0)
    if x0.device.type not in ("cpu", "cuda"):
        raise TypeError(f"chains run on the CPU or a CUDA GPU, got x0 on {x0.device}")
    if x0.dim() < 1:
        raise ValueError("x0 must have shape (B, ...), got a tensor without dimensions")
    return x0


def check_steps(start_step: int, num_steps: int, key_steps: int = 1) -> tuple[int, int]:
    """The two as ints; each step takes `key_steps` of the random numbers. Raises ValueError for those beyond 2**32,
    where the noise would repeat, and for a negative number of them, and TypeError for what is not whole."""
    start_step, num_steps = as_int("start_step", start_step), as_count("num_steps", num_steps)
    if not 0 <= start_step <= start_step + num_steps * key_steps <= rng.MAX_STEP:
        raise ValueError(
            f"steps {start_step} to {start_step + num_steps * key_steps} of the random numbers leave the range 0 to "
            "2**32"
        )
    return start_step, num_steps


def conditions_of(conditions: Any, x: Tensor) -> tuple[Tensor, ...]:
    """`conditions` with a row for each chain of x. Raises TypeError or ValueError for those that don't fit."""
    given = as_conditions(conditions, len(x))
    for each in given:
        check_dense("a condition", each)
        if each.device != x.device:
            raise ValueError(f"a condition is on {each.device}, x0 on {x.device}")
    return given


def expand_to(shape: torch.Size, name: str, value: Tensor, device: torch.device) -> Tensor:
    """A view of `value` with `shape`. Raises TypeError or ValueError where it does not broadcast to it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    check_dense(name, value)
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, x0 on {device}")
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to x0's shape {tuple(shape)}, got {tuple(value.shape)}")
    return value.expand(shape)


def expand_image(shape: torch.Size, name: str, value: Tensor, device: torch.device) -> Tensor:
    """`expand_to` for what `x` becomes or is pulled to. Raises TypeError for whole numbers, which are no pixels, and
    ValueError for an image of one channel where x has several."""
    view = expand_to(shape, name, value, device)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of floating point numbers, as x0 is, got {value.dtype}")
    one_channel = len(shape) == 4 and shape[1] > 1 and (value.dim() < 3 or value.shape[-3] == 1)
    if one_channel and value.shape[-2:] == shape[2:] and math.prod(shape[2:]) > 1:
        raise ValueError(
            f"{name} is an image of one channel, of shape {tuple(value.shape)}, but x0 has {shape[1]}: expand it first"
        )
    return view


def laid_like(x: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `value` as `dtype`, with the memory layout of `x`, whose shape it has."""
    return torch.empty_like(x, dtype=dtype).copy_(value)


def projected(project: Projection, x: Tensor) -> Tensor:
    result = project(x)
    if not isinstance(result, Tensor) or result.dtype != x.dtype or result.device != x.device:
        raise TypeError(f"project must return a tensor of {x.dtype} on {x.device}, like its input, got {shown(result)}")
    if result.shape != x.shape:
        raise ValueError(f"project must return {tuple(x.shape)}, like its input, got {tuple(result.shape)}")
    return result
