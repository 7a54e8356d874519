"""`Diagnostics`: what running chains tell about themselves, kept in memory that does not grow with their length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastebm.memory import check_memory
from fastebm.sampling.diagnostics import estimates
from fastebm.sampling.diagnostics.accumulators import (
    MAX_BLOCKS,
    Accumulator,
    Blocks,
    LaggedProducts,
    RunningCovariance,
    RunningMoments,
    Tally,
    merge_chains,
    ordered_dot,
)
from fastebm.sampling.diagnostics.scalars import Scalars, Summary
from fastebm.sampling.diagnostics.summary import ChainSummary
from fastebm.sampling.diagnostics.swaps import SwapCounter
from fastebm.scalars import as_count, as_real, shown

_KINDS: dict[str, type[Accumulator]] = {
    "blocks": Blocks,
    "lags": LaggedProducts,
    "elements": RunningMoments,
    "gradient_norm": RunningMoments,
    "covariance": RunningCovariance,
    "displacement": RunningMoments,
    "energy_error": RunningMoments,
    "large_errors": Tally,
    "accepted": Tally,
}
LARGE_ERROR = 1000.0
"""An energy error above it is a divergence, as in Stan."""


ENOUGH_CHAINS = 64
"""From whose means alone a sample size is told: their variance then has an error of 18%."""


class Diagnostics:
    """Accumulates what chains tell while they run: call `update` after their updates, and `summary` at any time.

    All sums are float64, on the device of the states, and per chain: those of a chain are the same bits however chains
    are split into batches. Nothing waits for the device before `summary`. A chain takes 8 bytes times `3 * lags + 64`
    for each scalar summary, 16 for each element of its state (with gradients 32), and nothing for each update.

    Args:
        summaries: functions of the states `(B, ...)` that give a number for each, `(B,)`, by name. There are also the
            energy, the mean and the norm of the state, and random projections.
        projections: the number of projections of the state onto random directions of norm 1.
        seed: of these directions.
        lags: L, the longest distance in updates at which autocovariances are kept. Effective sample sizes of chains
            with a longer correlation are estimated from the means of blocks.
        moments: whether means and variances of each element are kept.
        superchains: int64 `(B,)`, the group of each chain, for nested R-hat: chains of a group start at one point.
            Groups are of equal size.
        temperature: what the sampler's step size and noise imply, or that at the start and at the end of a schedule.
        keep_scalars: keeps the scalar summaries of every update, for `ChainSummary.to_arviz` and pictures.
        energies: False leaves out energies that are given, such as the zeros of a score.
        every, warmup: where a sampler calls `update`: after every so many updates, by default at 512 to 1,023 places
            of a long chain and after each update of a short one; and not before `warmup` updates.

    Raises ValueError or TypeError for options out of range.

    Example:
        >>> import torch, fastebm
        >>> sampler = fastebm.Langevin(lambda x: 0.5 * x.square().sum(1), **fastebm.schedules.from_epsilon(0.5))
        >>> diagnostics = fastebm.diagnostics.Diagnostics(temperature=1.0)
        >>> ends = sampler.sample(torch.zeros(100, 2), 400, seed=1, keep=diagnostics.callback)
        >>> summary = diagnostics.summary()
        >>> bool(summary.rhat.max() < 1.05), bool(summary.ess.min() > 1000)
        (True, True)
        >>> bool((summary.element_variance - 1).abs().max() < 0.2)
        True
    """

    def __init__(
        self,
        *,
        summaries: Mapping[str, Summary] | None = None,
        projections: int = 3,
        seed: int = 0,
        lags: int = 63,
        moments: bool = True,
        superchains: Tensor | None = None,
        temperature: float | tuple[float, float] | None = None,
        keep_scalars: bool = False,
        energies: bool = True,
        every: int | None = None,
        warmup: int = 0,
    ) -> None:
        self.scalars = Scalars(summaries, projections, seed)
        self.lags = as_count("lags", lags, 1)
        self.moments = bool(moments)
        self.superchains = None if superchains is None else _check_groups(superchains)
        self.temperature = _check_temperature(temperature)
        self.keep_scalars = bool(keep_scalars)
        self.energies = bool(energies)
        self.every = None if every is None else as_count("every", every, 1)
        self.warmup = as_count("warmup", warmup)
        self.swaps = SwapCounter()
        self._kept: dict[str, Accumulator] = {}
        self._given: tuple[str, ...] = ()
        self._shape = torch.Size()
        self._trace: list[Tensor] = []

    def __repr__(self) -> str:
        return f"Diagnostics({self.num_updates} updates of {len(self._shape) and self._shape[0]} chains)"

    @property
    def num_updates(self) -> int:
        """How often `update` was called."""
        blocks = self._kept.get("blocks")
        return blocks.count if isinstance(blocks, Blocks) else 0

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the scalar summaries, in their order."""
        return (*(("energy",) if "energy" in self._given else ()), *self.scalars.names)

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        energy: Tensor | None = None,
        gradient: Tensor | None = None,
        accepted: Tensor | None = None,
        energy_error: Tensor | None = None,
        before: Tensor | None = None,
    ) -> None:
        """Counts the states of all chains once. What is given in the first call, beside `before`, is given in all.

        Args:
            x: the states `(B, ...)`, of floating point; read and not kept.
            energy, gradient: `(B,)` and like x, at `before` where it is given, as samplers report them, else at x.
            accepted: bool `(B,)`, which proposals were accepted.
            energy_error: `(B,)`, how far a trajectory was from keeping its energy.
            before: the states before the update, like x.

        Raises ValueError or TypeError for shapes and dtypes that don't fit one another or earlier calls.
        """
        energy = energy if self.energies else None
        given = {"energy": energy, "gradient": gradient, "accepted": accepted, "energy_error": energy_error}
        self._check(x, given, before)
        own = self.scalars(x)
        values = torch.stack(own if energy is None else [energy.double(), *own], 1)
        first = not self._kept
        if first:
            self._start(x, values, given)
        kept: dict[str, Any] = self._kept
        kept["blocks"].add(values)
        kept["lags"].add(values)
        if self.moments:
            kept["elements"].add(x.double())
        if gradient is not None:
            kept["gradient_norm"].add(ordered_dot(gradient, gradient).sqrt())
            if self.moments:
                kept["covariance"].add((x if before is None else before).double(), gradient.double())
        if accepted is not None:
            kept["accepted"].add(accepted)
        if energy_error is not None:
            kept["energy_error"].add(energy_error.double())
            kept["large_errors"].add(~(energy_error <= LARGE_ERROR))
        if before is not None:
            moved = x.double() - before.double()
            if "displacement" not in kept:
                kept["displacement"] = RunningMoments.like(values[:, 0])
            kept["displacement"].add(ordered_dot(moved, moved).sqrt())
        if self.keep_scalars:
            self._trace.append(values)

    def update_from(self, x: Tensor, info: Any) -> None:
        """`update` with what a sampler's `step` reports, a `StepInfo` or more: its energy, gradient, `accepted` and
        `energy_error` (or `log_ratio`, of which that is the negative, in units of the temperature), where it has them,
        and the states before."""
        reported = {name: getattr(info, name, None) for name in ("energy", "gradient", "accepted", "energy_error")}
        ratio = getattr(info, "log_ratio", None)
        if reported["energy_error"] is None and ratio is not None:
            reported["energy_error"] = -ratio
        self.update(x, **reported, before=getattr(info, "before", None))

    @property
    def callback(self) -> Callable[[int, Tensor, Any], None]:
        """A function for one call of a sampler, `sampler.sample(..., keep=diagnostics.callback)`.

        It calls `update_from`. For chains in one batch: it raises ValueError where a second one follows, whose chains
        would pass for later updates of the first.
        """
        check = in_order()

        def call(k: int, x: Tensor, info: Any) -> None:
            check(k)
            self.update_from(x, info)

        return call

    def summary(self) -> ChainSummary:
        """What the chains have told so far. Syncs with the host.

        Raises ValueError where there was no update, or there are no chains.
        """
        if not self._kept:
            raise ValueError("there is nothing to sum up: no update was observed yet")
        kept: dict[str, Any] = self._kept
        blocks: Blocks = kept["blocks"]
        whole, halves = blocks.whole(), blocks.halves()
        pooled = merge_chains(blocks.count, whole.mean, whole.squares)
        autocovariances = kept["lags"].autocovariances(whole)
        size, bound = estimates.pooled_sample_size(autocovariances, whole)
        # Correlation beyond the window shows in the means of long stretches, if there are enough of them. Those of
        # whole chains leave out none of it.
        if self._shape[0] >= ENOUGH_CHAINS:
            by_means = estimates.batch_means_sample_size(whole.mean[None], pooled.variance)
            told = bound & (by_means < size)
            size, bound = torch.where(told, by_means, size), bound & ~told
        elif blocks.full >= MAX_BLOCKS // 2:
            by_means = estimates.batch_means_sample_size(blocks.means[: blocks.full], pooled.variance)
            size = torch.where(bound, torch.minimum(size, by_means), size)
        unknown = torch.full_like(pooled.mean, math.nan)
        drift, drift_error = (unknown, unknown) if halves is None else estimates.drift(halves)
        elements = kept.get("elements")
        per_element = None if elements is None else merge_chains(elements.count, elements.mean, elements.squares)
        covariance = kept.get("covariance")
        moments = {
            name: kept[name].moments for name in ("gradient_norm", "displacement", "energy_error") if name in kept
        }
        chain_sizes = estimates.chain_sample_sizes(autocovariances, whole)
        elements_of_chain = math.prod(self._shape[1:])
        return ChainSummary(
            names=self.names,
            num_chains=self._shape[0],
            num_updates=blocks.count,
            lags=self.lags,
            mean=pooled.mean,
            std=pooled.variance.sqrt(),
            rhat=unknown if halves is None else estimates.split_rhat(halves),
            drift=drift,
            drift_error=drift_error,
            ess=size,
            ess_is_bound=bound,
            nested_rhat=None if self.superchains is None else estimates.nested_rhat(whole, self._groups()),
            superchain_size=None if self.superchains is None else len(self.superchains) // self._num_groups(),
            chain_mean=whole.mean,
            chain_variance=whole.variance,
            chain_ess=chain_sizes.size,
            finite=(whole.mean.isfinite() & whole.squares.isfinite()).all(1),
            acceptance=kept["accepted"].rate if "accepted" in kept else None,
            energy_error=moments.get("energy_error"),
            divergences=kept["large_errors"].number if "large_errors" in kept else None,
            gradient_norm=moments.get("gradient_norm"),
            displacement=moments.get("displacement"),
            temperature=None if covariance is None else float(covariance.pooled()) / elements_of_chain,
            implied_temperature=self.temperature,
            element_mean=None if per_element is None else per_element.mean,
            element_variance=None if per_element is None else per_element.variance,
            swaps=self.swaps.summary(),
            scalars=torch.stack(self._trace) if self._trace else None,
        )

    def fresh(self, first: int | None = None, last: int | None = None) -> Diagnostics:
        """Diagnostics with the same options that have seen nothing: for the chains `first` to `last - 1` of a batch."""
        other = object.__new__(Diagnostics)
        other.__dict__ = dict(self.__dict__)
        if self.superchains is not None and first is not None:
            other.superchains = self.superchains[first:last]
        other.swaps = SwapCounter()
        other._kept, other._given, other._shape, other._trace = {}, (), torch.Size(), []
        return other

    @staticmethod
    def concatenate(parts: Sequence[Diagnostics]) -> Diagnostics:
        """What diagnostics of all the chains in one batch would be, bit for bit, from those of its batches in order.

        Raises ValueError where there is no part, or parts saw other numbers of updates or other values.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("concatenate needs at least one part, got none")
        first = parts[0]
        joined = first.fresh()
        expected = first._kind()
        for part in parts[1:]:
            if part._kind() != expected:
                raise ValueError(f"diagnostics of batches must be alike, got {expected} and {part._kind()}")
        joined._given = first._given
        if first._kept:
            joined._shape = torch.Size((sum(part._shape[0] for part in parts), *first._shape[1:]))
        for name, accumulator in first._kept.items():
            joined._kept[name] = type(accumulator).concatenate([part._kept[name] for part in parts])
        joined._trace = [torch.cat(rows) for rows in zip(*(part._trace for part in parts), strict=True)]
        joined.swaps = SwapCounter.concatenate([part.swaps for part in parts])
        if first.superchains is not None:
            joined.superchains = torch.cat([part.superchains for part in parts if part.superchains is not None])
        return joined

    def state_dict(self) -> dict[str, Any]:
        """All that was accumulated, in tensors (not copied), numbers, strings and containers of them."""
        return {
            "names": list(self.names),
            "given": list(self._given),
            "shape": list(self._shape),
            "lags": self.lags,
            "seed": self.scalars.seed,
            "kept": {name: accumulator.state_dict() for name, accumulator in self._kept.items()},
            "trace": torch.stack(self._trace) if self._trace else None,
            "swaps": self.swaps.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str | None = None) -> None:
        """The inverse of `state_dict`, for diagnostics made with the same options; on `device`, by default as saved.

        Raises ValueError for the state of others, or of something else; what was accumulated here then stays.
        """
        try:
            other = self._loaded(state, device)
        except (TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"not the state of diagnostics: {error}") from None
        self.__dict__.update(other.__dict__)

    def _loaded(self, state: Mapping[str, Any], device: torch.device | str | None) -> Diagnostics:
        expected = {"names", "given", "shape", "lags", "seed", "kept", "trace", "swaps"}
        if not isinstance(state, Mapping) or set(state) != expected:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"not the state of diagnostics: it has {sorted(expected)}, got {found}")
        other = self.fresh()
        other._given = tuple(state["given"])
        saved = list(state["names"]), state["lags"], state["seed"]
        own = list(other.names), self.lags, self.scalars.seed
        if saved != own:
            raise ValueError(
                "the state is of diagnostics with the summaries {}, lags={}, seed={}; these have {}, lags={}, "
                "seed={}".format(*saved, *own)
            )
        other._shape = torch.Size(state["shape"])
        for name, kept in state["kept"].items():
            if name not in _KINDS:
                raise ValueError(f"not the state of diagnostics: it has an unknown part {shown(name)}")
            other._kept[name] = _KINDS[name].from_state_dict(kept, device)
        trace = state["trace"]
        other._trace = [] if trace is None else list((trace if device is None else trace.to(device)).unbind())
        other.swaps = SwapCounter.from_state_dict(state["swaps"], device)
        other._check_loaded()
        return other

    def _kind(self) -> str:
        """What must be the same in all batches, in words."""
        trace = ", with traces" if self._trace else ""
        groups = "" if self.superchains is None else ", in superchains"
        seen = f"{', '.join(self._kept)} of states {tuple(self._shape[1:])}" if self._kept else "nothing"
        return f"{self.num_updates} updates of {', '.join(self.names)} ({seen}, lags={self.lags}{trace}{groups})"

    def _check(self, x: Tensor, given: Mapping[str, Tensor | None], before: Tensor | None) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a tensor of floating point numbers, got {shown(x)}")
        if not x.dim() or not math.prod(x.shape[1:]):
            raise ValueError(f"x must be (B, ...) with an element at least for each chain, got {tuple(x.shape)}")
        names = tuple(name for name, value in given.items() if value is not None)
        if self._kept:
            if x.shape != self._shape:
                raise ValueError(f"x must be {tuple(self._shape)} as in earlier updates, got {tuple(x.shape)}")
            if names != self._given:
                raise ValueError(
                    f"earlier updates were given {', '.join(self._given) or 'x alone'}, this one "
                    f"{', '.join(names) or 'x alone'}"
                )
        if self.superchains is not None and len(self.superchains) != len(x):
            raise ValueError(f"superchains has {len(self.superchains)} entries, but there are {len(x)} chains")
        for name, value in (*given.items(), ("before", before)):
            if value is None:
                continue
            shape = x.shape if name in ("gradient", "before") else x.shape[:1]
            if (
                not isinstance(value, Tensor)
                or value.is_complex()
                or (name == "accepted" and value.dtype != torch.bool)
            ):
                kind = "bool" if name == "accepted" else "real numbers"
                raise TypeError(f"{name} must be a tensor of {kind}, got {shown(value)}")
            if value.shape != shape or value.device != x.device:
                raise ValueError(f"{name} must be {tuple(shape)} on {x.device}, got {shown(value)}")

    def _start(self, x: Tensor, values: Tensor, given: Mapping[str, Tensor | None]) -> None:
        """Makes room for all that is accumulated."""
        scalars, elements = values.numel(), x.numel() if self.moments else 0
        per_element = 32 if given["gradient"] is not None else 16
        needed = 8 * (3 * self.lags + 2 * MAX_BLOCKS) * scalars + per_element * elements
        check_memory(f"the diagnostics of {len(x):,} chains", needed, x.device)
        self._shape, one = x.shape, values[:, 0]
        self._given = tuple(name for name, value in given.items() if value is not None)
        make: dict[str, Callable[[], Accumulator]] = {
            "blocks": lambda: Blocks.like(values),
            "lags": lambda: LaggedProducts.like(values, self.lags),
            "elements": lambda: RunningMoments.like(x),
            "gradient_norm": lambda: RunningMoments.like(one),
            "covariance": lambda: RunningCovariance.like(x),
            "accepted": lambda: Tally.like(one),
            "energy_error": lambda: RunningMoments.like(one),
            "large_errors": lambda: Tally.like(one),
        }
        parts = self._parts(self._given)
        self._kept = {name: made() for name, made in make.items() if name in parts}

    def _parts(self, given: Sequence[str]) -> set[str]:
        """What is accumulated of updates that are given so much, beside the displacement."""
        parts = {"blocks", "lags"} | ({"elements"} if self.moments else set())
        if "gradient" in given:
            parts |= {"gradient_norm"} | ({"covariance"} if self.moments else set())
        if "accepted" in given:
            parts |= {"accepted"}
        if "energy_error" in given:
            parts |= {"energy_error", "large_errors"}
        return parts

    def _check_loaded(self) -> None:
        """Raises ValueError where tensors don't fit the shape of the states, or one another."""
        if not self._kept:
            return
        parts = self._parts(self._given)
        if not self._shape or set(self._kept) - {"displacement"} != parts:
            raise ValueError(
                f"the state is of diagnostics that keep {', '.join(sorted(self._kept)) or 'nothing'}; these keep "
                f"{', '.join(sorted(parts))}"
            )
        if len(self._trace) != (self.num_updates if self.keep_scalars else 0):
            raise ValueError(
                f"the state has the scalar summaries of {len(self._trace)} of {self.num_updates} updates; these "
                f"diagnostics keep {'all' if self.keep_scalars else 'none'}"
            )
        chains, scalars = self._shape[0], len(self.names)
        for name, accumulator in self._kept.items():
            for field, value in accumulator.state_dict().items():
                if not isinstance(value, Tensor):
                    fits = value >= 0 and (field != "count" or name == "displacement" or value == self.num_updates)
                elif value.dtype != (torch.int64 if isinstance(accumulator, Tally) else torch.float64):
                    fits = False
                elif accumulator.chain_dim:
                    fits = value.shape[1:] == (chains, scalars)
                elif name == "elements" or (name == "covariance" and field != "products"):
                    fits = value.shape == self._shape
                else:
                    fits = value.shape == (chains,)
                if not fits:
                    raise ValueError(f"not the state of diagnostics: {field} of {name} does not fit the others")
        blocks: Any = self._kept["blocks"]
        lags: Any = self._kept["lags"]
        if (
            len(blocks.means) != MAX_BLOCKS
            or len(blocks.squares) != MAX_BLOCKS
            or not (blocks.full < MAX_BLOCKS and blocks.filled < blocks.length and lags.count == blocks.count)
            or {len(lags.products), len(lags.ring), len(lags.head)} != {self.lags}
        ):
            raise ValueError("not the state of diagnostics: its blocks and lags do not fit one another")

    def _groups(self) -> Tensor:
        """The superchain of each chain, 0 to K - 1. Raises ValueError where they are not of equal size."""
        assert self.superchains is not None
        _, groups, sizes = self.superchains.unique(return_inverse=True, return_counts=True)
        least, most = int(sizes.min()), int(sizes.max())
        if least != most:
            raise ValueError(f"superchains must be of equal size for nested R-hat, got {least} to {most} chains")
        return groups

    def _num_groups(self) -> int:
        assert self.superchains is not None
        return len(self.superchains.unique())


def in_order() -> Callable[[int], None]:
    """A function that is told the number of each update, and raises ValueError where it is not above the last one."""
    last = 0

    def check(k: int) -> None:
        nonlocal last
        if k <= last:
            raise ValueError(
                f"update {k} was reported after update {last}: chains that run in batches need Diagnostics for each, "
                "which Diagnostics.concatenate joins"
            )
        last = k

    return check


def _check_groups(superchains: Tensor) -> Tensor:
    if not isinstance(superchains, Tensor) or superchains.dtype != torch.int64 or superchains.dim() != 1:
        raise TypeError(f"superchains must be an int64 tensor (B,), got {shown(superchains)}")
    return superchains.detach().clone()


def _check_temperature(temperature: Any) -> tuple[float, float] | None:
    if temperature is None:
        return None
    pair = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    if len(pair) != 2:
        raise ValueError(f"temperature must be a number, or those at the start and the end, got {shown(temperature)}")
    start, end = (as_real("temperature", each) for each in pair)
    if not (0 <= start < math.inf and 0 <= end < math.inf):
        raise ValueError(f"temperature must be finite and not negative, got {shown(temperature)}")
    return start, end
