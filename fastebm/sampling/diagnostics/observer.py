"""How samplers hand their running chains to `Diagnostics`: observers, batch after batch and level after level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fastebm.compiler import ScoreGradient
from fastebm.sampling.diagnostics.streaming import Diagnostics, in_order
from fastebm.sampling.diagnostics.summary import ChainSummary
from fastebm.sampling.observers import Observer
from fastebm.sampling.state import copied
from fastebm.scalars import as_count, shown

OBSERVATIONS = 512
"""Of a long chain, at least."""


class Reader(Protocol):
    """What `run_observed` hands the updates to that it reads."""

    def updates_until_read(self, done: int) -> int:
        """How many updates after `done` earlier ones end with one that is read; at least 1."""

    def callback(self, k: int, x: Tensor, info: Any) -> None:
        """Reads update k, counted from 1."""


class DiagnosticsObserver:
    """An observer (`fastebm.sampling.observers`) of one batch, which reads the state after every `every`-th update.

    Called as an observer it sees states and energies. By `run_observed` it sees all that a step reports, and updates
    between those that are read run at once. It raises ValueError where a second batch follows.
    """

    reads_states = True

    def __init__(self, diagnostics: Diagnostics, every: int = 1, warmup: int = 0) -> None:
        self.diagnostics = diagnostics
        self.every = as_count("every", every, 1)
        self.warmup = as_count("warmup", warmup)
        self._before: Tensor | None = None
        self._check = in_order()

    def updates_until_read(self, done: int) -> int:
        """How many updates after `done` earlier ones end with one whose state is read; at least 1."""
        if done < self.warmup:
            return self.warmup - done + self.every
        return self.every - (done - self.warmup) % self.every

    def reads(self, done: int) -> bool:
        """Whether the state after update `done` is read."""
        return done > self.warmup and (done - self.warmup) % self.every == 0

    def __call__(self, done: int, x: Tensor, energies: Tensor) -> None:
        """Observes the state after update `done`; the displacement is that since the last one that was read."""
        self._check(done)
        if self.reads(done):
            self.diagnostics.update(x, energies, before=self._before)
            self._before = x.clone()

    def callback(self, k: int, x: Tensor, info: Any) -> None:
        """The same from what a step reports, gradients and acceptance too; see `Diagnostics.update_from`."""
        self._check(k)
        if self.reads(k):
            self.diagnostics.update_from(x, info)


def run_observed(
    sampler: Any,
    state: Any,
    num_steps: int,
    observer: Reader,
    observers: Sequence[Observer] = (),
    callback: Callable[[int, Tensor, Any], None] | None = None,
    thin: int = 1,
    **options: Any,
) -> Any:
    """The state `num_steps` updates after `state`, which is overwritten: the bits of the sampler's own `advance_`.

    Updates whose states are read are taken by `sampler.step`, which reports all there is to them; those between run by
    `sampler.advance_`, so that many of them may still be one call. `callback(k, x, info)` is called after every
    `thin`-th update, which then is a step as well. `options` go to both.
    """
    done, state = 0, sampler.own_state(state)
    with sampler.gradient.chain():
        while done < num_steps:
            until = observer.updates_until_read(done)
            if callback is not None:
                until = min(until, thin - done % thin)
            alone = min(until - 1, num_steps - done)
            if alone:
                if callback is not None:
                    state = copied(state)  # it may keep the one that it was given
                state = sampler.advance_(state, alone, [_Later(observe, done) for observe in observers], **options)
                done += alone
            if done < num_steps:
                state, info = sampler.step(state, **options)
                done += 1
                for observe in observers:
                    observe(done, state.x, info.energy)
                observer.callback(done, state.x, info)
                if callback is not None and done % thin == 0:
                    callback(done, state.x, info)
        sampler.gradient.leave_soon()
    return state


class _Later:
    """An observer of updates that follow `before` earlier ones."""

    def __init__(self, observe: Observer, before: int) -> None:
        self.observe, self.before = observe, before
        self.reads_states = getattr(observe, "reads_states", True)
        whole = getattr(observe, "observe_block", None)
        if whole is not None:
            self.observe_block = lambda done, x, energies: whole(before + done, x, energies)

    def __call__(self, done: int, x: Tensor, energies: Tensor) -> None:
        self.observe(self.before + done, x, energies)


class BatchedDiagnostics:
    """Diagnostics of one call of a sampler whose chains run in batches: an observer for each, and one summary.

    Args:
        diagnostics: True for the default options, or `Diagnostics` with others, which are left as they are.
        num_steps: the number of updates of the call.
        temperature: what the sampler implies, where `diagnostics` names none.
        energies: whether the sampler has any.

    Raises TypeError for anything else, and ValueError where none of the updates would be observed.
    """

    def __init__(
        self,
        diagnostics: Diagnostics | bool,
        num_steps: int,
        temperature: float | tuple[float, float] | None = None,
        *,
        energies: bool = True,
    ) -> None:
        if diagnostics is not True and not isinstance(diagnostics, Diagnostics):
            raise TypeError(f"diagnostics must be True, False or Diagnostics, got {shown(diagnostics)}")
        own = Diagnostics(temperature=temperature) if diagnostics is True else diagnostics.fresh()
        if own.temperature is None and temperature is not None:
            own.temperature = Diagnostics(temperature=temperature).temperature
        own.energies = own.energies and energies
        self.options = own
        counted = num_steps - own.warmup
        self.every = max(1, counted // OBSERVATIONS) if own.every is None else own.every
        if counted < self.every:
            raise ValueError(
                f"diagnostics would see none of {num_steps} updates: warmup={own.warmup}, every={self.every}"
            )
        self._parts: list[Diagnostics] = []

    def observer(self, first: int | None = None, last: int | None = None) -> DiagnosticsObserver:
        """The observer of the next batch, which holds the chains `first` to `last - 1`."""
        self._parts.append(self.options.fresh(first, last))
        return DiagnosticsObserver(self._parts[-1], self.every, self.options.warmup)

    @property
    def places(self) -> list[int]:
        """The updates, counted from 1, after which states were read."""
        number = self._parts[0].num_updates if self._parts else 0
        return [self.options.warmup + self.every * (k + 1) for k in range(number)]

    def result(self) -> Diagnostics:
        """The diagnostics of the chains of all batches so far."""
        return Diagnostics.concatenate(self._parts)

    def summary(self) -> ChainSummary:
        """Their summary. Syncs with the host."""
        return self.result().summary()


class LevelDiagnostics:
    """Diagnostics of each level of a cascade, from its callbacks.

    Args:
        diagnostics: as in `BatchedDiagnostics`; superchains are those of all chains in one batch.
        temperatures: what step size and noise imply at the start and at the end of each level, by size.

    Example:
        >>> import torch, fastebm
        >>> def energy(x):
        ...     return 0.5 * x.square().sum((1, 2, 3))
        >>> cascade = fastebm.Cascade({4: energy, 8: energy}, step_size=0.1)
        >>> levels = fastebm.diagnostics.LevelDiagnostics()
        >>> ends = cascade.sample(16, seed=1, channels=1, on_level_start=levels.start, keep=levels.callback)
        >>> [(size, summary.num_updates) for size, summary in levels.summaries().items()]
        [(4, 15), (8, 15)]
    """

    def __init__(
        self, diagnostics: Diagnostics | bool = True, temperatures: Mapping[int, tuple[float, float]] | None = None
    ) -> None:
        self._diagnostics = diagnostics
        self._temperatures = dict(temperatures or {})
        self._levels: dict[int, BatchedDiagnostics] = {}
        self._observer: DiagnosticsObserver | None = None
        self._before = 0

    def expect(self, levels: Iterable[Any]) -> None:
        """Raises as `BatchedDiagnostics` does where a level, which has any updates, would go unseen: before it runs."""
        for level in levels:
            if level.num_steps and level.size not in self._levels:
                temperature = self._temperatures.get(level.size)
                energies = not isinstance(level.sampler.gradient, ScoreGradient)
                self._levels[level.size] = BatchedDiagnostics(
                    self._diagnostics, level.num_steps, temperature, energies=energies
                )

    def observer(self, level: Any, first: int | None = None, last: int | None = None) -> DiagnosticsObserver | None:
        """The observer of the chains `first` to `last - 1` at a level; None where the level has no updates."""
        self.expect([level])
        return self._levels[level.size].observer(first, last) if level.num_steps else None

    def start(self, level: Any, x: Tensor) -> None:
        """For `on_level_start`: what follows is of this level."""
        self._observer, self._before = self.observer(level) or self._observer, -1

    def callback(self, k: int, x: Tensor, info: Any) -> None:
        """For `keep`, with `thin=1`: counts an update."""
        if self._observer is None:
            raise ValueError("LevelDiagnostics needs to be told where levels start: on_level_start=levels.start")
        if self._before < 0:
            self._before = k - 1
        self._observer.callback(k - self._before, x, info)

    def summaries(self) -> dict[int, ChainSummary]:
        """The summary of each level by its size, in the order of the chains."""
        return {size: level.summary() for size, level in self._levels.items()}

    def places(self, size: int) -> list[int]:
        """The updates of a level, counted from 1, after which states were read."""
        return self._levels[size].places
