"""Coarse-to-fine samplers: chains start at a low resolution and are enlarged from one resolution ("level") to the next.

`Cascade` has one energy for each level, `ExpandingCascade` one growing net whose newest block fades in. Both are the
samplers of CF-EBM (Zhao, Xie, Li, ICLR 2021; settings as in the authors' code). `LevelSampler` is their common base and
has the only loop over levels.

The step of the random numbers and the row of the schedule count on through the levels. Chains from noise start at
`2u - 1`, with `u` from stream INITIAL at their first step; the noise that an expanding cascade mixes into enlarged
images is from stream RESTART at the step reached. Both depend on seed, chain id and step alone, so that a batch may be
split.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastebm.ops  # noqa: F401  (registers torch.ops.fastebm)
from fastebm import rng
from fastebm.compiler import EnergyGradient
from fastebm.distributed import shared_rows
from fastebm.ops.langevin import expand_clamp
from fastebm.sampling.data_term import implicit_step
from fastebm.sampling.diagnostics import ChainReadings, Diagnostics, LevelDiagnostics, run_observed
from fastebm.sampling.langevin import Langevin, LangevinOptions
from fastebm.sampling.observers import Observer, checking_finite, progress_bar
from fastebm.sampling.sampler import (
    Callback,
    Energy,
    Projection,
    batch_slices,
    check_start,
    check_steps,
    conditions_of,
    repeat_start,
)
from fastebm.sampling.schedules import Schedule, evaluate, linear, one_for_all, table
from fastebm.sampling.state import ChainState, StepInfo
from fastebm.scalars import as_count, as_int, as_real

_CASCADE_NOISE = linear(0.015, 0.0)
_EXPANDING_NOISE = linear(0.03, 5e-4)

T = TypeVar("T")
LevelDataTerm = tuple[Tensor, float | Tensor | Schedule]
ForLevels: TypeAlias = T | Mapping[int, T]
"""A value for the last level, or values for several levels by their size."""


@dataclass(frozen=True)
class Level:
    """`num_steps` updates by `sampler` on images of `size`.

    On their way up to this level, images are mixed with uniform noise: `sqrt(1 - renoise**2) x + renoise U(-1, 1)`.
    """

    size: int
    sampler: Langevin
    num_steps: int
    renoise: float = 0.0


class LevelSampler(ABC):
    """The common base of both cascades: runs chains up through `levels`."""

    def __init__(
        self, step_size: float | Schedule, noise_std: float | Schedule, clamp_levels: bool, step_shrink: float
    ) -> None:
        step_shrink = as_real("step_shrink", step_shrink)
        if not 0 < step_shrink <= 1:
            raise ValueError(f"step_shrink must be in (0, 1], got {step_shrink}")
        one_for_all("step_size of a cascade", step_size)
        one_for_all("noise_std of a cascade", noise_std)
        self.step_size = step_size
        self.noise_std = noise_std
        self.clamp_levels = clamp_levels
        self.step_shrink = step_shrink

    @property
    @abstractmethod
    def levels(self) -> list[Level]:
        """The levels in the order in which chains go through them; each size is twice the one before."""

    @property
    @abstractmethod
    def schedule_lengths(self) -> list[int]:
        """The numbers of updates over which the schedules run, one after the other."""

    @property
    def schedule(self) -> Tensor:
        """The float32 table `(num_steps of all levels, 2)` of (step size, noise std)."""
        return torch.cat([table(self.step_size, self.noise_std, length) for length in self.schedule_lengths])

    def __repr__(self) -> str:
        levels = ", ".join(f"{level.num_steps} steps at {level.size}" for level in self.levels)
        return f"{type(self).__name__}({levels}; step_size={self.step_size}, noise_std={self.noise_std})"

    @torch.no_grad()
    def sample(
        self,
        count: int | None = None,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        x0: Tensor | None = None,
        start_size: int | None = None,
        channels: int | None = None,
        mask: ForLevels[Tensor] | None = None,
        known: ForLevels[Tensor] | None = None,
        data_term: ForLevels[LevelDataTerm] | None = None,
        conditions: Sequence[Tensor] = (),
        project: ForLevels[Projection] | None = None,
        start_step: int = 0,
        thin: int = 1,
        keep: Literal["last"] | Callback = "last",
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        check: bool = True,
        on_level_start: Callable[[Level, Tensor], None] | None = None,
        on_level_end: Callable[[Level, Tensor], None] | None = None,
        diagnostics: Diagnostics | bool = False,
        readings: Callable[[Level, ChainState], ChainReadings | None] | None = None,
    ) -> Any:
        """Runs chains up to the last level and returns their ends, float32 images `(count, channels, size, size)`.

        Without `x0`, chains start at U(-1, 1). Chains that start at a higher level than the lowest have the step
        numbers and the rows of the schedule that a chain from the lowest level has there. The last update is not
        followed by a clamp, so that values may lie slightly outside of [-1, 1].

        `mask`, `known`, `data_term` and `project` are for the last level, or mappings from the sizes of levels to
        such values.

        Args:
            count: the number of chains, by default that of `x0`. A single start is repeated.
            seed, chain_ids, start_step, batch_size, progress, check: as in `Langevin.sample`.
            x0: float32 images (B, C, s, s) at which chains start; not changed.
            start_size: the size of the level at which chains start. By default the size of `x0`, or the lowest level.
                A larger `x0` is averaged down to it.
            channels: of the images; needed if there is no `x0` and no net has an attribute `channels`.
            mask, known: known pixels, where `mask` is True, as in `Langevin.init`.
            data_term: `(target, weight)`: adds `weight * (x - target)` to the gradient. The updates are implicit
                (`fastebm.sampling.implicit_step`), so that the weight may be large. It is a number, a tensor of one, or
                a schedule, which runs as those of the step size and noise do. The step sizes are computed in the
                precision of the weight: float64 for a number or schedule, its dtype for a tensor.
            project: a function of the images of all chains, called after every update, as in `Langevin.sample`.
            conditions: as in `Langevin.init`; the energies of all levels are called with them.
            thin, keep: `keep` is "last", or a function called as `callback(k, x, info)` after every `thin`-th update,
                counted through the levels, batch after batch.
            device: where the chains run. By default the device of `x0`, or of the first net's weights.
            on_level_start, on_level_end: called with each level and the images at its start or end, batch after batch.
                They may read the images of the start, but not keep them: the level overwrites them.
            diagnostics: as in `Langevin.sample`: `(images, summaries)` is returned, with a `ChainSummary` of each level
                that has updates, by its size.
            readings: called at the start of each level, batch after batch, with its chains; it returns what then reads
                them, or None. Not with `diagnostics`. The chains keep their bits.

        Raises ValueError or TypeError for arguments that don't fit, FloatingPointError as `Langevin.sample` does.

        Example:
            >>> import torch, fastebm
            >>> def energy(x):
            ...     return 0.5 * x.square().sum((1, 2, 3))
            >>> cascade = fastebm.Cascade({4: energy, 8: energy}, step_size=0.1)
            >>> images = torch.rand(2, 1, 8, 8)
            >>> ends = cascade.sample(x0=images, start_size=4, mask=images > 0.5, known=images, seed=1)
            >>> torch.equal(ends[images > 0.5], images[images > 0.5])
            True
        """
        thin = as_count("thin", thin, 1)
        if not callable(keep) and keep != "last":
            raise ValueError(f'keep is "last" or a function, got {keep!r}')
        x = self._start_images(count, x0, start_size, channels, device)
        levels = [level for level in self.levels if level.size >= x.shape[3]]
        num_steps = sum(level.num_steps for level in levels)
        schedule = self.schedule.to(x.device)
        begin = len(schedule) - num_steps
        start_step, _ = check_steps(start_step, len(schedule))
        start = ChainState(
            x=x,
            key=rng.make_key(rng.draw_seed() if seed is None else seed, start_step + begin, begin, device=x.device),
            chain_ids=rng.make_chain_ids(chain_ids, len(x), device=x.device),
            schedule=schedule,
            step=start_step + begin,
            conditions=conditions_of(conditions, x),
        )
        constraints = [self._constraint(level, schedule, mask, known, data_term, project) for level in levels]
        for level, constraint in zip(levels, constraints, strict=True):
            constraint.check(level, x)
        projections = [each.project for each in constraints if each.project is not None]
        batch_slices(len(x), batch_size, projections[0] if projections else None)  # raises
        report = _every(thin, keep) if callable(keep) else None
        told = None
        if diagnostics is not False and readings is not None:
            raise ValueError("chains are read by diagnostics or by readings, not by both")
        if diagnostics is not False:
            told = LevelDiagnostics(diagnostics, self.level_temperatures())
            told.expect(levels)

        def through_levels(first: int, last: int, bar: Sequence[Observer]) -> Tensor:
            state = start.rows(first, last)
            with checking_finite(state, check) as watch:
                observers = [*watch, *bar]
                for level, constraint in zip(levels, constraints, strict=True):
                    if level is not levels[0]:
                        state = replace(state, x=self._enlarge(state, level.renoise))
                    elif x0 is not None:
                        state = replace(state, x=state.x.clone())
                    else:
                        state = replace(state, x=_symmetric_noise(state.x.shape, state, rng.Stream.INITIAL))
                    state = constraint.apply(level, state, first, last, len(x))
                    if on_level_start is not None:
                        on_level_start(level, state.x)
                    options: dict[str, Any] = {"observers": observers, "project": constraint.project}
                    sampler: Any = level.sampler
                    if self.step_shrink < 1:
                        sampler = _Shrinking(sampler, self.step_shrink)
                        state = sampler.with_steps_of_chains(state)
                    callback = None if report is None else report(state.step - start.step)
                    reader: Any = None if told is None else told.observer(level, first, last)
                    if readings is not None and (reader := readings(level, state)) is not None:
                        options["observers"] = [*observers, reader]
                    if reader is not None:
                        options["callback"] = callback
                        state = run_observed(sampler, state, level.num_steps, reader, **options)
                    elif callback is None:
                        state = sampler.advance_(state, level.num_steps, **options)
                    else:
                        state = sampler.run_with_callback(state, level.num_steps, callback, **options)
                    if on_level_end is not None:
                        on_level_end(level, state.x)
            return state.x

        level_ends = on_level_end if isinstance(on_level_end, _LevelEnds) else None

        def chains(rows: range) -> tuple[Tensor, dict[int, Tensor] | None]:
            batches = batch_slices(len(rows), batch_size)
            with progress_bar(num_steps * len(batches), progress) as bar:
                ends = [through_levels(rows.start + first, rows.start + last, bar) for first, last in batches]
            return torch.cat(ends), None if level_ends is None else level_ends.images

        # Callbacks and diagnostics are told of all chains, and a projection acts on all of them at once.
        told_of_all = (report, told, readings, on_level_start, on_level_end if level_ends is None else None)
        if projections or any(each is not None for each in told_of_all):
            images, _ = chains(range(len(x)))
        else:
            images, ends_of_all = shared_rows(len(x), chains)
            if level_ends is not None and ends_of_all is not None:
                level_ends.images = ends_of_all
        return images if told is None else (images, told.summaries())

    def level_temperatures(self) -> dict[int, tuple[float, float]]:
        """The temperatures that step sizes and noise imply at the first and the last update of each level, by size."""
        found, rows = {}, iter(self.schedule.double().tolist())
        for level in self.levels:
            own = [next(rows) for _ in range(level.num_steps)]
            if own:
                (step, noise), (last_step, last_noise) = own[0], own[-1]
                found[level.size] = noise**2 / (2 * step), last_noise**2 / (2 * last_step)
        return found

    def sample_levels(self, *arguments: Any, **options: Any) -> dict[int, Tensor]:
        """The images at the end of each level that chains go through, by size. Arguments are those of `sample`."""
        ends = _LevelEnds()
        self.sample(*arguments, **options, on_level_end=ends)
        return ends.images

    def _start_images(
        self,
        count: int | None,
        x0: Tensor | None,
        start_size: int | None,
        channels: int | None,
        device: torch.device | str | None,
    ) -> Tensor:
        """The images at which chains start; for chains from noise, a tensor with their shape and device alone."""
        levels = self.levels
        sizes = [level.size for level in levels]
        count = None if count is None else as_count("count", count)
        start_size = None if start_size is None else as_count("start_size", start_size, 1)
        if count is not None and count > rng.MAX_CHAIN:
            raise ValueError(f"count must be at most 2^56, got {count}")
        if x0 is None:
            size = sizes[0] if start_size is None else start_size
            channels = self._net_channels() if channels is None else channels
            if count is None or channels is None:
                missing = "count or x0" if count is None else "channels, which no net has as an attribute"
                raise ValueError(f"a cascade that starts from noise needs {missing}")
            channels = as_count("channels", channels, 1)
            if channels * sizes[-1] ** 2 > rng.MAX_ELEMENTS:
                raise ValueError(
                    f"an image has at most 2^34 elements, got {channels} channels of {sizes[-1]}x{sizes[-1]}"
                )
            _check_start_size(size, sizes)
            device = device_of(levels[0].sampler.gradient) if device is None else device
            x = torch.empty((), dtype=torch.float32, device=device).expand(count, channels, size, size)
        else:
            if not isinstance(x0, Tensor) or x0.ndim != 4 or x0.dtype != torch.float32:
                found = f"{x0.dtype} {tuple(x0.shape)}" if isinstance(x0, Tensor) else type(x0).__name__
                raise ValueError(f"x0 must be float32 (B, C, H, W), got {found}")
            check_start(x0)
            if channels is not None and as_int("channels", channels) != x0.shape[1]:
                raise ValueError(f"channels is {channels}, but x0 has {x0.shape[1]}")
            size = x0.shape[3] if start_size is None else start_size
            if size < 1 or x0.shape[3] % size or x0.shape[2] % (x0.shape[3] // size):
                raise ValueError(f"x0 of {x0.shape[2]}x{x0.shape[3]} can't be averaged down to start_size {size}")
            x = x0 if size == x0.shape[3] else F.avg_pool2d(x0, x0.shape[3] // size)
            x = repeat_start(x, count, "count").to(device)
        _check_start_size(size, sizes)
        return x

    def _net_channels(self) -> int | None:
        """The attribute `channels` of the first net that has one."""
        for level in self.levels:
            channels = getattr(module_of(level.sampler.gradient), "channels", None)
            if isinstance(channels, int):
                return channels
        return None

    def _constraint(
        self,
        level: Level,
        schedule: Tensor,
        mask: ForLevels[Tensor] | None,
        known: ForLevels[Tensor] | None,
        data_term: ForLevels[LevelDataTerm] | None,
        project: ForLevels[Projection] | None,
    ) -> _Constraint:
        """The constraint of one level, chosen from values for the last level or for levels by their size."""
        sizes = [each.size for each in self.levels]

        def at_level(value: ForLevels[T] | None) -> T | None:
            if not isinstance(value, Mapping):
                return value if level.size == sizes[-1] else None
            if unknown := sorted(set(value) - set(sizes)):
                raise ValueError(f"the levels have the sizes {sizes}, but values are given for {unknown}")
            return value.get(level.size)

        term, rows = at_level(data_term), None
        if term is not None:
            if not isinstance(term, tuple) or len(term) != 2:
                raise TypeError("the data_term of a cascade is a tuple (target, weight)")
            weight: Any = term[1]
            step_sizes = torch.cat([evaluate(self.step_size, length) for length in self.schedule_lengths])
            if isinstance(weight, Tensor) and weight.is_floating_point():
                step_sizes = step_sizes.to(weight.dtype)
            weight = one_for_all("the weight of data_term", weight)
            rows = torch.cat([evaluate(weight, length) for length in self.schedule_lengths])
            implicit = implicit_step(step_sizes, rows.to(step_sizes.dtype)).to(schedule)
            schedule = torch.stack((implicit, schedule[:, 1]), 1)
        return _Constraint(schedule, at_level(mask), at_level(known), term, rows, at_level(project))

    def _enlarge(self, state: ChainState, renoise: float) -> Tensor:
        """Twice the size by nearest neighbours, then `sqrt(1 - renoise**2) x + renoise U(-1, 1)`, then clamped."""
        x = F.interpolate(state.x, scale_factor=2, mode="nearest")
        if renoise > 0:
            noise = _symmetric_noise(x.shape, state, rng.Stream.RESTART)
            # Not `add(alpha=...)`: it may fuse in whole vectors but not in the rest, which depends on the batch's size.
            x = x * math.sqrt(1 - renoise**2) + noise * renoise
        return x.clamp_(-1, 1) if self.clamp_levels else x


class _LevelEnds:
    """Keeps the images at the end of each level, by its size: an `on_level_end` that chains may be split for."""

    def __init__(self) -> None:
        self.images: dict[int, Tensor] = {}

    def __call__(self, level: Level, x: Tensor) -> None:
        before = self.images.get(level.size)
        self.images[level.size] = x if before is None else torch.cat((before, x))


class _Shrinking:
    """A Langevin sampler of one batch at one level that shrinks the step sizes of chains whose energy rose."""

    def __init__(self, sampler: Langevin, shrink: float) -> None:
        self.sampler, self.shrink = sampler, shrink
        self.gradient = sampler.gradient
        self._energies: Tensor | None = None
        self._factors: Tensor | None = None

    def with_steps_of_chains(self, state: ChainState) -> ChainState:
        """The state with a schedule for each chain, which steps shrink in place."""
        return replace(state, schedule=state.schedule[:, None].repeat(1, len(state.x), 1))

    def own_state(self, state: ChainState) -> ChainState:
        return self.sampler.own_state(state)

    def step(self, state: ChainState, *, project: Projection | None = None) -> tuple[ChainState, StepInfo]:
        self._shrink(state)
        state, info = self.sampler.step(state, project=project)
        self(1, state.x, info.energy)
        return state, info

    def advance_(
        self,
        state: ChainState,
        num_steps: int,
        observers: Sequence[Observer] = (),
        *,
        project: Projection | None = None,
    ) -> ChainState:
        with self.gradient.chain():
            for done in range(1, num_steps + 1):
                self._shrink(state)
                state = self.sampler.advance_(state, 1, [self], project=project)
                for observe in observers:
                    assert self._energies is not None  # the update has told of them
                    observe(done, state.x, self._energies)
        return state

    def run_with_callback(
        self,
        state: ChainState,
        num_steps: int,
        callback: Callback,
        *,
        observers: Sequence[Observer] = (),
        project: Projection | None = None,
    ) -> ChainState:
        with self.gradient.chain():
            for done in range(1, num_steps + 1):
                state, info = self.step(state, project=project)
                for observe in observers:
                    observe(done, state.x, info.energy)
                callback(done, state.x, info)
        return state

    def __call__(self, done: int, x: Tensor, energies: Tensor) -> None:
        """Learns of the energies before an update, which shrink the step sizes from the next one on."""
        if self._energies is not None:
            rose = energies > self._energies
            self._factors = torch.where(rose, self.shrink, torch.ones((), device=rose.device))
        self._energies = energies.clone()  # an engine may write its next ones there

    def _shrink(self, state: ChainState) -> None:
        if self._factors is not None:
            state.schedule[..., 0].mul_(self._factors)
            self._factors = None


@dataclass(frozen=True)
class _Constraint:
    """The schedule of the chains at one level, and what holds them there."""

    schedule: Tensor
    mask: Tensor | None
    known: Tensor | None
    data_term: LevelDataTerm | None
    weights: Tensor | None
    project: Projection | None

    def check(self, level: Level, x: Tensor) -> None:
        """Raises ValueError or TypeError where this doesn't fit the images of chains at a level, of which x has as many
        and as many channels."""
        shape = torch.Size((*x.shape[:2], x.shape[2] * level.size // x.shape[3], level.size))
        target = None if self.data_term is None else self.data_term[0]
        for value in (self.mask, self.known, target):
            if isinstance(value, Tensor) and value.dim() == 4 and len(value) not in (1, len(x)):
                raise ValueError(f"a mask, known or target holds {len(value)} images, but there are {len(x)} chains")
        level.sampler.check_constraints(shape, x.device, self.mask, self.known, self.data_term, weights=self.weights)
        expand_clamp(level.sampler.clamp, torch.empty((), device="cpu").expand(shape))

    def apply(self, level: Level, state: ChainState, first: int, last: int, count: int) -> ChainState:
        """`state`, of the chains `first` to `last - 1` of `count`, under this constraint alone."""

        def rows(value: Any) -> Any:
            whole = not isinstance(value, Tensor) or value.dim() < 4 or (len(value) == 1 and count != 1)
            return value if whole else value[first:last]

        state = replace(state, schedule=self.schedule, mask=None, known=None, data_target=None, data_term_weight=None)
        term = None if self.data_term is None else (rows(self.data_term[0]), self.data_term[1])
        return level.sampler.constrain(state, rows(self.mask), rows(self.known), term, weights=self.weights)


class Cascade(LevelSampler):
    """One energy for each resolution: `num_steps` updates at the lowest one, then as many at twice the size, and so on.

    The start is U(-1, 1) at the lowest resolution; between levels images are enlarged by nearest neighbours and clamped
    to [-1, 1]. The schedules run once over the whole cascade. Several threads may use one cascade, as one `Langevin`.

    Args:
        levels: energies of images `(B, C, size, size)` by size, as `Langevin` takes them; each size is twice the one
            below. In a trained run the lower ones are the nets at the end of their stage of training.
        num_steps: the number of updates at each level; the authors use 15, and 20 for face crops.
        step_size, noise_std: numbers or schedules over all levels together.
        clamp_levels: whether enlarged images are clamped to [-1, 1].
        step_shrink: a factor in (0, 1] on the step size of a chain, up to the end of its level, after each update that
            raised its energy. The energy after an update is known in the next one, so that it acts after that.
        options: clamp, grad_clip, grad_norm_clip, dtype, engine, as in `Langevin`; the recipe has no clip in an update.

    Example:
        >>> import torch, fastebm
        >>> def energy(x):
        ...     return 0.5 * x.square().sum((1, 2, 3))
        >>> cascade = fastebm.Cascade({4: energy, 8: energy}, step_size=0.1)
        >>> cascade.sample(16, seed=1, channels=1).shape
        torch.Size([16, 1, 8, 8])
    """

    def __init__(
        self,
        levels: Mapping[int, Energy],
        *,
        num_steps: int = 15,
        step_size: float | Schedule = 1.0,
        noise_std: float | Schedule = _CASCADE_NOISE,
        clamp_levels: bool = True,
        step_shrink: float = 1.0,
        **options: Unpack[LangevinOptions],
    ) -> None:
        super().__init__(step_size, noise_std, clamp_levels, step_shrink)
        if not isinstance(levels, Mapping):
            raise TypeError(f"levels must be a mapping from sizes to energies, got {type(levels).__name__}")
        energies = {as_int("the size of a level", size): energy for size, energy in levels.items()}
        sizes = sorted(energies)
        if not sizes or sizes[0] < 1 or any(high != 2 * low for low, high in itertools.pairwise(sizes)):
            raise ValueError(f"a cascade needs levels whose size doubles from one to the next, got sizes {sizes}")
        num_steps = _check_level_steps(num_steps)
        self._levels = [
            Level(size, Langevin(energies[size], step_size, noise_std, **options), num_steps) for size in sizes
        ]

    @property
    def levels(self) -> list[Level]:
        return list(self._levels)

    @property
    def schedule_lengths(self) -> list[int]:
        return [sum(level.num_steps for level in self._levels)]


class ExpandingCascade(LevelSampler):
    """One growing net, `net(x, beta=...)`, whose newest block fades in as `beta` goes from 0 to 1.

    While `beta < 1`: from U(-1, 1), `round(num_steps * (1 - beta))` updates at half of `size`; images enlarged by
    nearest neighbours; `x <- sqrt(1 - beta**2) x + beta U(-1, 1)`; clamped to [-1, 1]; `num_steps` updates at `size`.
    At `beta = 1`: `num_steps` updates at `size` from U(-1, 1). The schedules run once in each level. Several threads
    may use one cascade, as one `Langevin`, while none sets `beta`.

    Args:
        net: called as `net(x, beta=beta)` on `(B, C, size, size)`, with a number or a 0-dimensional tensor, and,
            without `previous`, as `net(x, beta=1.0)` on images of half of it.
        size: the even size of the images.
        previous: the energy at half of `size`, for instance the net before it grew; by default `net` itself.
        beta: the weight of the newest block, in [0, 1]; may be set later.
        num_steps: the number of updates at `size`; the authors use 50 to 75.
        step_size, noise_std: numbers or schedules over each level; the authors use 1 to 2, and 0.03 to 5e-4 or 0.01.
        clamp_levels: whether enlarged images are clamped to [-1, 1].
        step_shrink: a factor in (0, 1] on the step size of a chain, up to the end of its level, after each update that
            raised its energy. The energy after an update is known in the next one, so that it acts after that.
        options: clamp, grad_clip, grad_norm_clip, dtype, engine, as in `Langevin`; the recipe has no clip in an update.

    Example:
        >>> import torch, fastebm
        >>> class Growing(torch.nn.Module):
        ...     def forward(self, x, beta=1.0):
        ...         return (0.1 + 0.4 * beta) * x.square().sum((1, 2, 3))
        >>> cascade = fastebm.sampling.ExpandingCascade(Growing(), size=8, beta=0.5, num_steps=10, step_size=0.1)
        >>> cascade
        ExpandingCascade(5 steps at 4, 10 steps at 8; step_size=0.1, noise_std=linear(0.03, 0.0005))
        >>> cascade.sample(16, seed=1, channels=1).shape
        torch.Size([16, 1, 8, 8])
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        size: int,
        previous: Energy | None = None,
        beta: float = 1.0,
        num_steps: int = 50,
        step_size: float | Schedule = 1.0,
        noise_std: float | Schedule = _EXPANDING_NOISE,
        clamp_levels: bool = True,
        step_shrink: float = 1.0,
        **options: Unpack[LangevinOptions],
    ) -> None:
        super().__init__(step_size, noise_std, clamp_levels, step_shrink)
        size = as_int("size", size)
        if size < 2 or size % 2:
            raise ValueError(f"an expanding cascade needs an even size, got {size}")
        num_steps = _check_level_steps(num_steps)

        def sampler(energy: Energy) -> Langevin:
            return Langevin(energy, step_size, noise_std, **options)

        self.size = size
        self.num_steps = num_steps
        with torch.inference_mode(False):  # autograd reads it, wherever this sampler is made
            self._blend = torch.ones((), dtype=torch.float32, device=device_of(net))
        self._lower = sampler(functools.partial(net, beta=1.0) if previous is None else previous)
        # At the ends the net skips what has weight 0; in between, one energy serves and reads beta in every chain.
        self._upper = {end: sampler(functools.partial(net, beta=end)) for end in (0.0, 1.0)}
        self._between = sampler(functools.partial(net, beta=self._blend))
        self.beta = beta

    @property
    def beta(self) -> float:
        """The weight of the newest block, in [0, 1]."""
        return self._beta

    @beta.setter
    def beta(self, beta: float) -> None:
        beta = as_real("beta", beta)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {beta}")
        self._beta = beta
        self._blend.fill_(beta)

    @property
    def levels(self) -> list[Level]:
        lower = Level(self.size // 2, self._lower, round(self.num_steps * (1 - self._beta)))
        upper = Level(self.size, self._upper.get(self._beta, self._between), self.num_steps, renoise=self._beta)
        return [upper] if self._beta == 1 else [lower, upper]

    @property
    def schedule_lengths(self) -> list[int]:
        return [level.num_steps for level in self.levels if level.num_steps > 0]


def module_of(energy: Energy) -> nn.Module | None:
    """The module behind an energy: itself, or that of a `functools.partial`, a bound method or an `EnergyGradient`."""
    function: Any = energy.energy if isinstance(energy, EnergyGradient) else energy
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__self__", function)
    return function if isinstance(function, nn.Module) else None


def device_of(energy: Energy) -> torch.device:
    """The device of an energy's weights; the CPU for an energy without weights."""
    module = module_of(energy)
    if module is not None:
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")


def _symmetric_noise(shape: torch.Size, state: ChainState, stream: rng.Stream) -> Tensor:
    """U(-1, 1) for the chains of `state` at its step."""
    noise: Tensor = torch.ops.fastebm.uniform(shape, state.key, state.chain_ids, stream, torch.float32)
    return noise.mul_(2).sub_(1)


def _every(thin: int, callback: Callback) -> Callable[[int], Callback]:
    """A function that gives the callback of a level from the number of updates before it.

    That callback calls `callback` after every `thin`-th update, counted through the levels.
    """

    def from_level(done: int) -> Callback:
        def report(k: int, x: Tensor, info: StepInfo) -> None:
            if (done + k) % thin == 0:
                callback(done + k, x, info)

        return report

    return from_level


def _check_start_size(size: int, sizes: list[int]) -> None:
    if size not in sizes:
        raise ValueError(f"chains start at the size of one of the levels, {sizes}, got {size}")


def _check_level_steps(num_steps: int) -> int:
    num_steps = as_int("num_steps", num_steps)
    if num_steps < 1:
        raise ValueError(f"a cascade needs at least one step a level, got num_steps={num_steps}")
    return check_steps(0, num_steps)[1]
