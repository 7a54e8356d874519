"""Coarse-to-fine sampling: chains that start from noise at a low resolution and are enlarged between levels.

The two variants of CF-EBM (Zhao, Xie, Li, ICLR 2021; settings as in the authors' code): `Cascade` has one energy per
resolution, `ExpandingCascade` one growing net whose newest block fades in.

The steps of the random numbers and the rows of the schedule count on through the levels. The start is `2u - 1` with `u`
from stream INITIAL at the first step; the noise mixed in when an expanding cascade enlarges comes from stream RESTART
at the step reached. Both depend on seed, chain and step alone, so a batch may be split anyhow.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

import fastebm.ops  # noqa: F401  (registers torch.ops.fastebm)
from fastebm import rng
from fastebm.compiler import EnergyGradient
from fastebm.sampling.data_term import implicit_step
from fastebm.sampling.langevin import Callback, Energy, Langevin, LangevinOptions, batch_slices, check_steps
from fastebm.sampling.observers import Observer, checking_finite, progress_bar
from fastebm.sampling.schedules import Schedule, linear, table
from fastebm.sampling.state import ChainState, StepInfo

_CASCADE_NOISE = linear(0.015, 0.0)
_EXPANDING_NOISE = linear(0.03, 5e-4)


@dataclass(frozen=True)
class Level:
    """`num_steps` updates by `sampler` on images of `size`, which on the way up to it are mixed with `renoise` of noise."""

    size: int
    sampler: Langevin
    num_steps: int
    renoise: float = 0.0


class LevelSampler(ABC):
    """What both cascades share: chains from uniform noise up through `levels`."""

    def __init__(self, step_size: float | Schedule, noise_std: float | Schedule, clamp_levels: bool) -> None:
        self.step_size = step_size
        self.noise_std = noise_std
        self.clamp_levels = clamp_levels

    @property
    @abstractmethod
    def levels(self) -> list[Level]:
        """The levels in the order in which a chain goes through them."""

    @property
    @abstractmethod
    def schedule(self) -> Tensor:
        """The float32 table `(num_steps of all levels, 2)` of (step size, noise std)."""

    def __repr__(self) -> str:
        levels = ", ".join(f"{level.num_steps} steps at {level.size}" for level in self.levels)
        return f"{type(self).__name__}({levels}; step_size={self.step_size}, noise_std={self.noise_std})"

    def sample(
        self,
        count: int,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        channels: int,
        start_step: int = 0,
        thin: int = 1,
        keep: Literal["last"] | Callback = "last",
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        check: bool = True,
    ) -> Tensor:
        """Runs `count` chains from noise to the last level: float32 images `(count, channels, size, size)`.

        The last updates are not followed by a clamp: values slightly beyond [-1, 1] are the chain's own.

        Args:
            count: the number of chains.
            seed, chain_ids, start_step, batch_size, progress, check: as in `Langevin.sample`.
            channels: of the images.
            keep: "last", or a function called as `callback(k, x, info)` after every `thin`-th update, counted through
                the levels, batch after batch.
            device: where the chains run; by default where the first level's weights lie.
        """
        ends = self.sample_levels(
            count,
            seed,
            chain_ids,
            channels=channels,
            start_step=start_step,
            thin=thin,
            keep=keep,
            batch_size=batch_size,
            device=device,
            progress=progress,
            check=check,
        )
        return ends[max(ends)]

    @torch.no_grad()
    def sample_levels(
        self,
        count: int,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        channels: int,
        start_step: int = 0,
        thin: int = 1,
        keep: Literal["last"] | Callback = "last",
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        check: bool = True,
        on_start: Callable[[Level, Tensor], None] | None = None,
    ) -> dict[int, Tensor]:
        """`sample`, but with the images at the end of each level, by size.

        on_start: called with each level and the images that it starts from, batch after batch; it may read them, but
            the level goes on to overwrite them.
        """
        if thin < 1:
            raise ValueError(f"thin must be at least 1, got {thin}")
        if not callable(keep) and keep != "last":
            raise ValueError(f'keep is "last" or a function, got {keep!r}')
        if count < 0 or channels < 1:
            raise ValueError(f"a cascade needs count >= 0 and channels >= 1, got count={count}, channels={channels}")
        levels, schedule = self.levels, self.schedule
        check_steps(start_step, len(schedule))
        device = device_of(levels[0].sampler.gradient) if device is None else torch.device(device)
        start = ChainState(
            x=torch.empty((count, channels, levels[0].size, levels[0].size), device=device),
            key=rng.make_key(rng.draw_seed() if seed is None else seed, start_step, device=device),
            chain_ids=rng.make_chain_ids(chain_ids, count, device=device),
            schedule=schedule.to(device),
            step=start_step,
        )
        report = _every(thin, keep) if callable(keep) else None
        batches = list(batch_slices(count, batch_size))
        ends: dict[int, list[Tensor]] = {level.size: [] for level in levels}
        with progress_bar(len(schedule) * len(batches), progress) as bar:
            for first, last in batches:
                state = start.rows(first, last)
                with checking_finite(state, check) as watch:
                    for level, x in self._climb(levels, state, report, [*watch, *bar], on_start):
                        ends[level.size].append(x)
        return {size: torch.cat(parts) for size, parts in ends.items()}

    @torch.no_grad()
    def refine(
        self,
        x: Tensor,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        data_term: tuple[Tensor, float] | None = None,
        batch_size: int | None = None,
        check: bool = True,
    ) -> Tensor:
        """Where the last level leads from images of one's own, (B, C, size, size) in float32, which stay as they are.

        Noise and schedule are what a chain from noise has at that level. `seed`, `chain_ids`, `batch_size` and `check` are
        as in `Langevin.sample`, and so are `mask` and `known`, which pin pixels. `data_term` is a target and the weight of
        the pull towards it, which may be large: its updates are implicit (`implicit_step`). Raises ValueError for
        images of another size.
        """
        level, schedule = self.levels[-1], self.schedule
        if x.ndim != 4 or x.shape[2:] != (level.size, level.size) or x.dtype != torch.float32:
            raise ValueError(
                f"images must be float32 (B, C, {level.size}, {level.size}), got {x.dtype} {tuple(x.shape)}"
            )
        begin = len(schedule) - level.num_steps
        seed = rng.draw_seed() if seed is None else seed
        if data_term is not None:
            schedule = torch.stack((implicit_step(schedule[:, 0], data_term[1]), schedule[:, 1]), 1)
        held: dict[str, Any] = {"mask": mask, "known": known, "data_term": data_term}
        return level.sampler.sample_segment(
            x, schedule, begin, level.num_steps, seed, chain_ids, batch_size=batch_size, check=check, **held
        )

    def _climb(
        self,
        levels: Sequence[Level],
        state: ChainState,
        report: Callable[[int], Callback] | None,
        observers: Sequence[Observer],
        on_start: Callable[[Level, Tensor], None] | None,
    ) -> Iterator[tuple[Level, Tensor]]:
        """Each level with the images at its end. `state.x` gives the shape of the start, not its values."""
        begin = state.step
        x = _symmetric_noise(state.x.shape, state, rng.Stream.INITIAL)
        for level in levels:
            if level is not levels[0]:
                x = self._enlarged(state, level.renoise)
            state = replace(state, x=x)
            if on_start is not None:
                on_start(level, x)
            if report is None:
                state = level.sampler.advance_(state, level.num_steps, observers)
            else:
                state = level.sampler.run_with_callback(
                    state, level.num_steps, report(state.step - begin), observers=observers
                )
            yield level, state.x

    def _enlarged(self, state: ChainState, renoise: float) -> Tensor:
        """Twice the size by nearest neighbours, then `sqrt(1 - renoise**2) x + renoise U(-1, 1)`, then clamped."""
        x = nn.functional.interpolate(state.x, scale_factor=2, mode="nearest")
        if renoise > 0:
            noise = _symmetric_noise(x.shape, state, rng.Stream.RESTART)
            # Not `add(alpha=...)`: it may fuse in whole vectors but not in the rest, which depends on the batch's size.
            x = x * math.sqrt(1 - renoise**2) + noise * renoise
        return x.clamp_(-1, 1) if self.clamp_levels else x


class Cascade(LevelSampler):
    """One energy per resolution: `num_steps` updates at the lowest, then twice the size, `num_steps` updates there, and so on.

    The start is U(-1, 1) at the lowest resolution; between levels images are enlarged by nearest neighbours and clamped
    to [-1, 1]. The schedules run once over the whole cascade.

    Args:
        levels: energies of images `(B, C, size, size)` by size; each size is twice the one below. An energy is what
            `Langevin` takes. Lower ones are the nets as they stood when their stage of training ended.
        num_steps: updates at each level; the authors use 15, and 20 for face crops.
        step_size, noise_std: numbers or schedules over all levels together.
        clamp_levels: whether enlarged images are clamped to [-1, 1].
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
        **options: Unpack[LangevinOptions],
    ) -> None:
        super().__init__(step_size, noise_std, clamp_levels)
        sizes = sorted(levels)
        if not sizes or sizes[0] < 1 or any(high != 2 * low for low, high in itertools.pairwise(sizes)):
            raise ValueError(f"a cascade needs levels whose size doubles from one to the next, got sizes {sizes}")
        _check_level_steps(num_steps)
        self._levels = [
            Level(size, Langevin(levels[size], step_size, noise_std, **options), num_steps) for size in sizes
        ]

    @property
    def levels(self) -> list[Level]:
        return list(self._levels)

    @property
    def schedule(self) -> Tensor:
        return table(self.step_size, self.noise_std, sum(level.num_steps for level in self._levels))


class ExpandingCascade(LevelSampler):
    """One growing net, `net(x, beta=...)`, whose newest block fades in as `beta` goes from 0 to 1.

    While `beta < 1`: from U(-1, 1), `round(num_steps * (1 - beta))` updates at half of `size`; images enlarged by nearest
    neighbours; `x <- sqrt(1 - beta**2) x + beta U(-1, 1)`; clamped to [-1, 1]; `num_steps` updates at `size`. At
    `beta = 1`: `num_steps` updates at `size` from U(-1, 1). The schedules run once in each level.

    Args:
        net: called as `net(x, beta=beta)` on `(B, C, size, size)`, with a number or a 0-dimensional tensor, and,
            without `previous`, as `net(x, beta=1.0)` on images of half of it.
        size: of the images, even.
        previous: the energy at half of `size`, if it is another than `net` itself: the net as it stood before it grew.
        beta: in [0, 1]; may be set later.
        num_steps: updates at `size`; the authors use 50 to 75.
        step_size, noise_std: numbers or schedules over each level; the authors use 1 to 2, and 0.03 to 5e-4 or 0.01.
        clamp_levels: whether enlarged images are clamped to [-1, 1].
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
        **options: Unpack[LangevinOptions],
    ) -> None:
        super().__init__(step_size, noise_std, clamp_levels)
        if size < 2 or size % 2:
            raise ValueError(f"an expanding cascade needs an even size, got {size}")
        _check_level_steps(num_steps)

        def sampler(energy: Energy) -> Langevin:
            return Langevin(energy, step_size, noise_std, **options)

        self.size = size
        self.num_steps = num_steps
        self._blend = torch.ones((), device=device_of(net))
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
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {beta}")
        self._beta = float(beta)
        self._blend.fill_(beta)

    @property
    def levels(self) -> list[Level]:
        lower = Level(self.size // 2, self._lower, round(self.num_steps * (1 - self._beta)))
        upper = Level(self.size, self._upper.get(self._beta, self._between), self.num_steps, renoise=self._beta)
        return [upper] if self._beta == 1 else [lower, upper]

    @property
    def schedule(self) -> Tensor:
        return torch.cat(
            [table(self.step_size, self.noise_std, level.num_steps) for level in self.levels if level.num_steps > 0]
        )


def device_of(energy: Energy) -> torch.device:
    """Where an energy's weights lie; the CPU for one without weights."""
    function = energy.energy if isinstance(energy, EnergyGradient) else energy
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__self__", function)
    if isinstance(module, nn.Module):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")


def _symmetric_noise(shape: torch.Size, state: ChainState, stream: rng.Stream) -> Tensor:
    """U(-1, 1) for the chains of `state` at its step."""
    noise: Tensor = torch.ops.fastebm.uniform(shape, state.key, state.chain_ids, stream, torch.float32)
    return noise.mul_(2).sub_(1)


def _every(thin: int, callback: Callback) -> Callable[[int], Callback]:
    """For a level that begins after so many updates: its callback, which counts on through the levels."""

    def from_level(done: int) -> Callback:
        def report(k: int, x: Tensor, info: StepInfo) -> None:
            if (done + k) % thin == 0:
                callback(done + k, x, info)

        return report

    return from_level


def _check_level_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"a cascade needs at least one step a level, got num_steps={num_steps}")
