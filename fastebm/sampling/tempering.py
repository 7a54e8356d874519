"""Parallel tempering: replicas of a chain at a ladder of temperatures, which swap temperatures to cross barriers.

Source: Syed, Bouchard-Cote, Deligiannidis and Doucet, "Non-reversible parallel tempering: a scalable highly parallel
MCMC scheme", JRSS B 2022: even and odd pairs in turn, and the ladder tuned by the rejections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastebm import rng
from fastebm.compiler import EnergyGradient, require_energy
from fastebm.progress import progress_bar
from fastebm.sampling.diagnostics import BatchedDiagnostics, Diagnostics
from fastebm.sampling.observers import Observer, checking_finite
from fastebm.sampling.sampler import Energy, Sampler, check_start, check_steps, copied, gradient_of, repeat_start
from fastebm.sampling.state import SamplerState
from fastebm.scalars import as_count, shown

Kernel = Callable[[EnergyGradient, Tensor], Sampler[Any]]
"""Makes the sampler of the replicas from the energy and their temperatures, `(N,)`, one for each."""


@dataclass(frozen=True, eq=False)
class TemperedState:
    """The state of C tempered chains with R replicas each.

    Attributes:
        replicas: the state of all C * R replicas, those of one chain side by side.
        rung: int64 `(C, R)`: which temperature each replica has.
        rounds: how often swaps were tried, whose parity says which pairs come next.
        since: the steps since the last of them.
        accepted, tried: int64 `(C, R - 1)`, of the pairs of neighbouring temperatures.
        round_trips: int64 `(C,)`: how often a replica came back to the lowest temperature from the highest one.
        visited_top: bool `(C, R)`: replicas that were at the highest temperature since they left the lowest.
    """

    replicas: SamplerState
    rung: Tensor
    rounds: int
    accepted: Tensor
    tried: Tensor
    round_trips: Tensor
    visited_top: Tensor
    since: int = 0

    @property
    def x(self) -> Tensor:
        """The states at the lowest temperature, `(C, ...)`."""
        return self.at(0)

    def at(self, rung: int, values: Tensor | None = None) -> Tensor:
        """The states at the temperature of that number, `(C, ...)`; or those of `values` of all replicas."""
        count, size = self.rung.shape
        holder = (self.rung == rung).long().argmax(1)
        return (self.replicas.x if values is None else values)[
            torch.arange(count, device=holder.device) * size + holder
        ]

    @property
    def swap_rates(self) -> Tensor:
        """The share of accepted swaps of each pair of neighbouring temperatures, float64 `(R - 1,)`; NaN where none
        was tried."""
        return self.accepted.sum(0).double() / self.tried.sum(0)

    def state_dict(self) -> dict[str, Any]:
        """All fields by name; those of the replicas begin with "replicas.", and "replicas" names their class."""
        own = {name: getattr(self, name) for name in (*_TENSORS, *_COUNTS)}
        replicas = {f"replicas.{name}": value for name, value in self.replicas.state_dict().items()}
        return own | {"replicas": type(self.replicas).__name__} | replicas

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device | str | None = None) -> TemperedState:
        """The inverse of `state_dict`, on `device`; by default on the device of the replicas.

        Raises ValueError for what is not the state of tempered chains.
        """
        try:
            return cls._from_fields(state, device)
        except TypeError as error:
            raise ValueError(f"not the state of tempered chains: {error}") from None

    @classmethod
    def _from_fields(cls, state: Mapping[str, Any], device: torch.device | str | None) -> TemperedState:
        if not isinstance(state, Mapping):
            raise TypeError(f"it must be a mapping of its fields, got {type(state).__name__}")
        of_replicas = {n.removeprefix(_PREFIX): v for n, v in state.items() if str(n).startswith(_PREFIX)}
        own = {n: v for n, v in state.items() if not str(n).startswith(_PREFIX)}
        names = {*_TENSORS, *_COUNTS, "replicas"}
        if own.keys() != names:
            missing, unknown = sorted(names - own.keys()), sorted(map(str, own.keys() - names))
            raise ValueError(f"not the state of tempered chains: missing {missing}, unknown {unknown}")
        kind = _kinds_of_states().get(own["replicas"]) if isinstance(own["replicas"], str) else None
        if kind is None:
            raise ValueError(f"there is no sampler state {shown(own['replicas'])}")
        replicas = kind.from_state_dict(of_replicas, device)
        rung = own["rung"]
        if not isinstance(rung, Tensor) or rung.dim() != 2 or rung.shape[1] < 2:
            raise ValueError(f"a tempered chain's rung has shape (C, R), got {shown(rung)}")
        count, size = rung.shape
        shapes = {
            "rung": (count, size),
            "accepted": (count, size - 1),
            "tried": (count, size - 1),
            "round_trips": (count,),
            "visited_top": (count, size),
        }
        for name, shape in shapes.items():
            value, dtype = own[name], torch.bool if name == "visited_top" else torch.int64
            if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
                raise ValueError(f"a tempered chain's {name} must be {dtype} {shape}, got {shown(value)}")
            own[name] = value.detach().to(replicas.x.device)
        if not torch.equal(own["rung"].sort(1).values, torch.arange(size, device=replicas.x.device).expand(count, -1)):
            raise ValueError("the replicas of a tempered chain hold all temperatures, each one of them")
        if len(replicas.x) != count * size:
            raise ValueError(
                f"{count} chains at {size} temperatures need {count * size} replicas, got {len(replicas.x)}"
            )
        return cls(**own | {"replicas": replicas} | {name: as_count(name, own[name]) for name in _COUNTS})


_TENSORS = ("rung", "accepted", "tried", "round_trips", "visited_top")
_COUNTS = ("rounds", "since")
_PREFIX = "replicas."


def _kinds_of_states(base: type[SamplerState] = SamplerState) -> dict[str, type[SamplerState]]:
    """The classes of sampler states by their names."""
    found = {base.__name__: base}
    for kind in base.__subclasses__():
        found |= _kinds_of_states(kind)
    return found


class ParallelTempering:
    """Chains of `p(x) ~ exp(-E(x) / T)` at the lowest of several temperatures, helped over barriers by the higher ones.

    Each chain is a set of replicas, one at each temperature, which all move by the sampler that `kernel` makes. After
    every `swap_every` steps neighbours try to swap their temperatures: even pairs and odd pairs in turn. States stay
    where they are, so that a swap costs nothing. With a kernel that is exact (MALA, HMC) so is the whole.

    Args:
        energy: as `Langevin` takes it.
        temperatures: two or more, ascending; the first is that of the samples.
        kernel: `(energy, temperatures) -> sampler`, for temperatures `(N,)` of N replicas, such as
            `lambda energy, t: fastebm.MALA(energy, 0.1 * t, temperature=t)`. Its options must not change along a chain.
        swap_every: steps between swaps.
        dtype, engine, reproducible: passed to `energy_gradient`.

    Raises ValueError or TypeError for options out of range.

    Example:
        >>> import torch, fastebm
        >>> wells = fastebm.ParallelTempering(
        ...     lambda x: 8 * (x.square() - 1).square().sum(1),
        ...     (1.0, 3.0, 9.0),
        ...     lambda energy, t: fastebm.MALA(energy, 0.01 * t, temperature=t),
        ... )
        >>> x = wells.sample(torch.ones(200, 1), num_steps=300, seed=1)
        >>> 0.3 < float((x < 0).float().mean()) < 0.7
        True
    """

    def __init__(
        self,
        energy: Energy,
        temperatures: Sequence[float] | Tensor,
        kernel: Kernel,
        *,
        swap_every: int = 1,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        reproducible: bool = True,
    ) -> None:
        self.gradient = require_energy(gradient_of(energy, dtype, engine, reproducible), "parallel tempering")
        self.temperatures = check_ladder(temperatures)
        self.swap_every = as_count("swap_every", swap_every, 1)
        if not callable(kernel):
            raise TypeError(f"kernel must be a function of the energy and temperatures, got {shown(kernel)}")
        self.kernel = kernel
        self._sampler(1)  # a kernel that doesn't take them is found here

    def __repr__(self) -> str:
        ladder = ", ".join(f"{t:g}" for t in self.temperatures.tolist())
        return f"ParallelTempering({self._sampler(1)!r}; temperatures {ladder}; swap_every={self.swap_every})"

    def _sampler(self, count: int) -> Sampler[Any]:
        made = self.kernel(self.gradient, self.temperatures.float().repeat(count))
        if not isinstance(made, Sampler):
            raise TypeError(f"kernel must make a sampler, got {shown(made)}")
        if made.gradient is not self.gradient:
            raise ValueError("kernel must build its sampler on the energy that it is given")
        if getattr(made, "minibatches", None) is not None:
            raise ValueError("swaps need the energy of all data, but the kernel's sampler takes minibatches")
        return made

    @torch.no_grad()
    def init(
        self,
        x0: Tensor,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        num_chains: int | None = None,
        start_step: int = 0,
        conditions: Sequence[Tensor] = (),
        **options: Any,
    ) -> TemperedState:
        """The state from which C chains start; arguments as in `Langevin.init`, a start `(C, ...)` for each chain.

        The replicas of chain i have the ids `i * R` to `i * R + R - 1`.
        """
        size = len(self.temperatures)
        x0 = repeat_start(check_start(x0), num_chains, "num_chains")
        count = len(x0)
        ids = rng.make_chain_ids(chain_ids, count, device=x0.device)
        ids = (ids if len(ids) == count else ids + torch.arange(count, device=ids.device)) * size
        ids = (ids[:, None] + torch.arange(size, device=ids.device)).flatten()
        given = tuple(conditions)
        wide = tuple(each.repeat_interleave(size, 0) if len(each) == count else each for each in given)
        for name in ("mask", "known"):
            value = options.get(name)
            if isinstance(value, Tensor) and value.dim() == x0.dim() and len(value) == count > 1:
                options[name] = value.repeat_interleave(size, 0)
        replicas = self._sampler(count).init(
            x0.repeat_interleave(size, 0), seed, ids, start_step=start_step, conditions=wide, **options
        )
        if replicas.schedule.dim() != 3 or len(replicas.schedule) != 1:
            raise ValueError("the kernel's options must depend on the temperature alone, not on the step")
        device = x0.device
        pairs = torch.zeros(count, size - 1, dtype=torch.int64, device=device)
        rung = torch.arange(size, device=device).repeat(count, 1)
        return TemperedState(
            replicas,
            rung,
            0,
            pairs,
            pairs.clone(),
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.zeros(count, size, dtype=torch.bool, device=device),
        )

    @torch.no_grad()
    def advance(self, state: TemperedState, num_steps: int, *, check: bool = True) -> TemperedState:
        """The state `num_steps` steps after `state`, which is left as it was; swaps after every `swap_every`-th, which
        calls that follow one another count together.

        Raises FloatingPointError where energies or states are not finite, unless `check` is False.
        """
        sampler = self._sampler(len(self._own_state(state).rung))
        _, num_steps = check_steps(sampler.own_state(state.replicas).step, num_steps, sampler.key_steps)
        state = replace(state, replicas=copied(state.replicas))
        with checking_finite(state.replicas, check) as observers, self.gradient.chain():
            done = 0
            while done < num_steps:
                step = min(self._until_swap(state), num_steps - done)
                state = self._advance_(sampler, state, step, observers)
                done += step
            self.gradient.leave_soon()
        return state

    def load_state(self, saved: Mapping[str, Any], device: torch.device | str | None = None) -> TemperedState:
        """The state that `state.state_dict()` gave, on `device`; by default on the device of its states.

        Raises ValueError for what is not a state of these temperatures and this kernel.
        """
        state, kernel = TemperedState.from_state_dict(saved, device), self._sampler(1)
        if type(state.replicas) is not kernel.state_type:
            raise ValueError(
                f"the state of tempered chains by this kernel has a {kernel.state_type.__name__}, "
                f"got {shown(state.replicas)}"
            )
        state = replace(state, replicas=kernel.load_state(state.replicas.state_dict()))
        size = len(self.temperatures)
        if state.rung.shape[1] != size:
            raise ValueError(f"these chains have {size} temperatures, but the state has {state.rung.shape[1]}")
        return state

    def _own_state(self, state: TemperedState) -> TemperedState:
        if not isinstance(state, TemperedState) or state.rung.shape[1] != len(self.temperatures):
            raise TypeError(
                f"ParallelTempering goes on from a TemperedState of {len(self.temperatures)} temperatures, as its init "
                f"makes it, got {shown(state)}"
            )
        return state

    def _until_swap(self, state: TemperedState) -> int:
        """How many steps there are until swaps are due, at least 1."""
        return max(1, self.swap_every - state.since)

    def _advance_(
        self, sampler: Sampler[Any], state: TemperedState, num_steps: int, observers: Sequence[Observer]
    ) -> TemperedState:
        """Takes steps in place, at most as many as there are until swaps are due, and then swaps."""
        replicas = sampler.advance_(state.replicas, num_steps, observers)
        state = replace(state, replicas=replicas, since=state.since + num_steps)
        return self.swap(state) if state.since >= self.swap_every else state

    @torch.no_grad()
    def swap(self, state: TemperedState) -> TemperedState:
        """One round of swaps of even or odd pairs, by the parity of `state.rounds`.

        Neighbours at `T < T'` with energies `E`, `E'` swap with probability `min(1, exp((1/T - 1/T') (E - E')))`.
        """
        replicas, rung = state.replicas, state.rung
        count, size = rung.shape
        device = rung.device
        kept = getattr(replicas, "energy", None)
        energy = self.gradient(replicas.x, replicas.conditions)[0] if kept is None else kept
        by_replica = energy.double().reshape(count, size)
        holder = rung.argsort(1)  # the replica at each rung
        at_rung = by_replica.gather(1, holder)
        inverse = 1 / self.temperatures.to(device)
        log_ratio = (inverse[:-1] - inverse[1:]) * (at_rung[:, :-1] - at_rung[:, 1:])
        ids = replicas.chain_ids.reshape(count, size)[:, 0].contiguous()
        uniform = torch.ops.fastebm.uniform((count, size - 1), replicas.key, ids, int(rng.Stream.SWAP), torch.float64)
        paired = torch.arange(size - 1, device=device) % 2 == state.rounds % 2
        accepted = (uniform.log() < log_ratio) & paired  # a NaN is no reason to swap
        low, high = holder[:, :-1], holder[:, 1:]
        step = torch.zeros_like(rung)
        step.scatter_add_(1, low, accepted.long())
        step.scatter_add_(1, high, -accepted.long())
        moved = rung + step
        top = state.visited_top | (moved == size - 1)
        home = top & (moved == 0)
        return TemperedState(
            self._retempered(replicas, rung.flatten(), moved.flatten()),
            moved,
            state.rounds + 1,
            state.accepted + accepted,
            state.tried + paired,
            state.round_trips + home.sum(1),
            top & ~home,
        )

    def _retempered(self, replicas: SamplerState, before: Tensor, after: Tensor) -> SamplerState:
        """Replicas with the options of the temperatures that they hold now; velocities keep their share of the heat."""
        size = len(self.temperatures)
        back = torch.empty_like(before.reshape(-1, size))
        back.scatter_(1, before.reshape(-1, size), torch.arange(size, device=before.device).expand_as(back))
        # Of each replica, the one that had its new temperature.
        owner = back.gather(1, after.reshape(-1, size))
        owner = (owner + torch.arange(len(owner), device=before.device)[:, None] * size).flatten()
        changed: dict[str, Any] = {"schedule": replicas.schedule[:, owner].contiguous()}
        if getattr(replicas, "temperature", None) is not None and replicas.temperature.dim() == 2:  # type: ignore[attr-defined]
            changed["temperature"] = replicas.temperature[:, owner].contiguous()  # type: ignore[attr-defined]
        velocity = getattr(replicas, "velocity", None)
        if velocity is not None:
            heat = self.temperatures.to(velocity.device, velocity.dtype)
            ratio = (heat[after] / heat[before]).sqrt().reshape(-1, *(1,) * (velocity.dim() - 1))
            changed["velocity"] = velocity * ratio
        return replace(replicas, **changed)

    def sample(
        self,
        x0: Tensor,
        num_steps: int,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        thin: int = 1,
        keep: Literal["last", "trajectory"] = "last",
        progress: bool = False,
        check: bool = True,
        diagnostics: bool | Diagnostics = False,
        **options: Any,
    ) -> Any:
        """Runs C chains of `num_steps` steps and returns their states at the lowest temperature, `(C, ...)` like x0.

        Args:
            x0, seed, chain_ids, options: as in `init`.
            num_steps: the number of steps, 0 or more.
            keep: "last", or "trajectory" for the start and every `thin`-th state after it,
                `(1 + num_steps // thin, C, ...)`.
            progress, check: as in `Langevin.sample`.
            diagnostics: True, or `Diagnostics` with options of your own, also returns what the states at the lowest
                temperature tell, and how often each pair swapped: `(x, summary)`.
        """
        return self.run(
            self.init(x0, seed, chain_ids, **options),
            num_steps,
            thin=thin,
            keep=keep,
            progress=progress,
            check=check,
            diagnostics=diagnostics,
        )

    @torch.no_grad()
    def run(
        self,
        state: TemperedState,
        num_steps: int,
        *,
        thin: int = 1,
        keep: Literal["last", "trajectory"] = "last",
        progress: bool = False,
        check: bool = True,
        diagnostics: bool | Diagnostics = False,
    ) -> Any:
        """`sample` from a state, whose tensors are overwritten. The swaps in a summary are those since `init`."""
        thin = as_count("thin", thin, 1)
        kernel = self._sampler(1)
        _, num_steps = check_steps(kernel.own_state(self._own_state(state).replicas).step, num_steps, kernel.key_steps)
        if keep not in ("last", "trajectory"):
            raise ValueError(f'keep is "last" or "trajectory", got {keep!r}')
        reader = None
        if diagnostics is not False:
            reader = BatchedDiagnostics(diagnostics, num_steps, float(self.temperatures[0])).observer()
        frames = [state.x] if keep == "trajectory" else None
        block = (
            thin if frames is not None else max(1, math.gcd(num_steps, self.swap_every * 50) if progress else num_steps)
        )
        with progress_bar(num_steps, "tempering", "step", shown=progress) as bar, self.gradient.chain():
            done = 0
            sampler = self._sampler(len(state.rung))
            with checking_finite(state.replicas, check) as observers:
                while done < num_steps:
                    step = min(block - done % block, self._until_swap(state), num_steps - done)
                    if reader is not None:
                        step = min(step, reader.updates_until_read(done))
                    state = self._advance_(sampler, state, step, observers)
                    done += step
                    if reader is not None and reader.reads(done):
                        kept = getattr(state.replicas, "energy", None)
                        reader.diagnostics.update(state.x, None if kept is None else state.at(0, kept))
                    if frames is not None and done % thin == 0:
                        frames.append(state.x)
                    if bar is not None:
                        bar.update(step)
            self.gradient.leave_soon()
        found = state.x if frames is None else torch.stack(frames)
        if reader is None:
            return found
        reader.diagnostics.swaps.update(state.tried, state.accepted)
        return found, reader.diagnostics.summary()

    @torch.no_grad()
    def tuned(
        self, x0: Tensor, num_rounds: int = 200, seed: int | None = None, *, size: int | None = None, **options: Any
    ) -> ParallelTempering:
        """The same with a ladder on which all pairs swap about equally often, between the same ends.

        Args:
            x0, seed, options: of the chains that are run for it, as in `sample`; their second half counts.
            num_rounds: rounds of swaps, at least 4.
            size: how many temperatures the new ladder has, by default as many as this one.

        The rejections along the ladder, summed up, are the barrier that replicas have to cross; the new temperatures
        cut it into equal pieces.
        """
        num_rounds = as_count("num_rounds", num_rounds, 4)
        size = len(self.temperatures) if size is None else as_count("size", size, 2)
        state = self.advance(self.init(x0, seed, **options), num_rounds // 2 * self.swap_every)
        zero = torch.zeros_like(state.accepted)
        counted = replace(state, accepted=zero, tried=zero.clone())
        rejected = 1 - self.advance(counted, num_rounds // 2 * self.swap_every).swap_rates.cpu()
        barrier = torch.cat((torch.zeros(1, dtype=torch.float64, device="cpu"), rejected.clamp_min(1e-3).cumsum(0)))
        wanted = torch.linspace(0, float(barrier[-1]), size, dtype=torch.float64, device="cpu")
        heat = self.temperatures.log()  # the barrier of a Gaussian is even in it
        right = torch.searchsorted(barrier, wanted).clamp(1, len(barrier) - 1)
        share = (wanted - barrier[right - 1]) / (barrier[right] - barrier[right - 1])
        ladder = (heat[right - 1] + share * (heat[right] - heat[right - 1])).exp()
        ladder[0], ladder[-1] = self.temperatures[0], self.temperatures[-1]
        return ParallelTempering(self.gradient, ladder, self.kernel, swap_every=self.swap_every)


def check_ladder(temperatures: Any) -> Tensor:
    """A ladder of temperatures as float64 `(R,)`. Raises ValueError or TypeError for another."""
    try:
        ladder = torch.as_tensor(temperatures, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"temperatures must be numbers, got {shown(temperatures)}") from None
    if ladder.dim() != 1 or len(ladder) < 2:
        raise ValueError(f"a ladder needs two temperatures or more, got {shown(temperatures)}")
    if not bool(ladder.isfinite().all()) or not float(ladder[0]) > 0 or not bool((ladder[1:] > ladder[:-1]).all()):
        raise ValueError(f"temperatures must be finite, positive and ascending, got {ladder.tolist()}")
    return ladder
