"""Observers of running chains: a check that all is finite, a progress bar, a recorder of trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastebm import progress
from fastebm.sampling.state import SamplerState

Observer = Callable[[int, Tensor, Tensor], None]
"""Called after an update with the number of updates done, the live state (do not keep it) and the energies before it.

An observer with `reads_states = False` may be called later, in order, when the state has moved on. If it has a method
`observe_block(done, x, energies)`, that may be called instead for several updates, with their energies `(n, B)`.
"""


def all_deferrable(observers: Sequence[Observer]) -> bool:
    """Whether no observer reads every state: then updates may run in blocks."""
    return not any(getattr(observe, "reads_states", True) for observe in observers)


def observe_block(observe: Observer, done: int, x: Tensor, energies: Tensor) -> None:
    """Tells an observer of several updates, after `done` earlier ones, with their energies `(n, B)`."""
    whole = getattr(observe, "observe_block", None)
    if whole is not None:
        whole(done + len(energies), x, energies)
        return
    for i, of_update in enumerate(energies.unbind()):
        observe(done + i + 1, x, of_update)


class FiniteCheck:
    """Counts for how many updates each chain's energy was finite, without a sync.

    The end of a chain alone does not show an infinite gradient, because a clamp hides it.
    """

    reads_states = False
    _FOLD = 64  # energies are copied after every update, but reduced only once in so many updates

    def __init__(self, start_step: int, chain_ids: Tensor) -> None:
        self.start_step = start_step
        self.chain_ids = chain_ids
        self.seen = 0
        self.finite = torch.zeros((), dtype=torch.int64, device=chain_ids.device)
        self.recent: list[Tensor] = []
        self.x: Tensor | None = None

    def __call__(self, done: int, x: Tensor, energies: Tensor) -> None:
        self._keep(x, energies[None])

    def observe_block(self, done: int, x: Tensor, energies: Tensor) -> None:
        if energies.is_cpu:
            self._fold()
            self.x = x
            self._count(energies)
        else:
            self._keep(x, energies)

    def _keep(self, x: Tensor, energies: Tensor) -> None:
        self.x = x
        self.recent.append(energies.clone())  # an engine may write its next energies to the same memory
        if sum(map(len, self.recent)) >= self._FOLD:
            self._fold()

    def _fold(self) -> None:
        if self.recent:
            self._count(torch.cat(self.recent))
            self.recent.clear()

    def _count(self, energies: Tensor) -> None:
        if energies.is_cpu and energies.dtype in (torch.float32, torch.float64) and _surely_finite(energies):
            leading: Tensor | int = len(energies)
        else:
            leading = energies.isfinite().cumprod(0).sum(0)
        self.finite = torch.where(self.finite == self.seen, self.finite + leading, self.finite)
        self.seen += len(energies)

    def check(self) -> None:
        """Raises FloatingPointError if an energy or the last state was not finite. Syncs with the host."""
        if self.x is None:
            return
        self._fold()
        count = self.x.shape[0]
        lost = (self.finite < self.seen) | ~self.x.isfinite().reshape(count, math.prod(self.x.shape[1:])).all(1)
        if not lost.any():
            return
        updates, chain = torch.where(lost, self.finite, self.seen + 1).min(0)
        first = int(updates)
        name = int(self.chain_ids[chain]) if self.chain_ids.shape[0] == count else int(self.chain_ids[0] + chain)
        where = f"energy before update {first + 1} of {self.seen} (step {self.start_step + first})"
        raise FloatingPointError(
            f"{int(lost.sum())} of {count} chains are not finite; the first is chain {name}, "
            f"by its {where if first < self.seen else 'state at the end'}. "
            "Try a smaller step_size, a clamp or a gradient clip; check=False returns such chains."
        )


def _surely_finite(energies: Tensor) -> bool:
    """Whether the sum is finite, which it is only where all terms are; on one thread, which waits for no other."""
    with np.errstate(all="ignore"):
        return math.isfinite(energies.numpy().sum())


@contextmanager
def checking_finite(state: SamplerState, check: bool) -> Iterator[Sequence[Observer]]:
    """A block that ends with FloatingPointError if a chain was not finite; gives the observer for it, if `check`."""
    if not check:
        yield ()
        return
    watch = FiniteCheck(state.step, state.chain_ids)
    yield (watch,)
    watch.check()


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Sequence[Observer]]:
    """A block with a bar of `total` updates, if `shown`; gives its observer, which reads energies only to redraw."""
    if not shown:
        yield ()
        return
    with progress.progress_bar(total, "Langevin", "step", shown=True) as bar:
        yield (_Progress(bar),)


class _Progress:
    """The observer that advances a tqdm bar."""

    reads_states = False

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, done: int, x: Tensor, energies: Tensor) -> None:
        if self.bar.update():
            self.bar.set_postfix(energy=f"{float(energies.mean()):.4g}", refresh=False)


def trajectory_recorder(frames: Tensor, thin: int) -> Observer:
    """An observer that copies the state after update `j * thin` to `frames[j]`."""

    def observe(done: int, x: Tensor, energies: Tensor) -> None:
        if done % thin == 0:
            frames[done // thin].copy_(x)

    return observe
