"""The explicit state of a batch of chains, and what one update reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Self, TypeVar, get_type_hints

import torch
from torch import Tensor

from fastebm import rng
from fastebm.compiler import as_conditions
from fastebm.ops.langevin import check as check_update
from fastebm.ops.normal import check_address
from fastebm.ops.options import StepOptions
from fastebm.scalars import as_int, as_real, shown

State = TypeVar("State", bound="SamplerState")


@dataclass(frozen=True, eq=False)
class SamplerState:
    """What the states of all samplers hold of `B` chains.

    Attributes:
        x: the states `(B, ...)`, float32 or float64.
        key: int64 `(3,)` on `x`'s device: seed, step of the random numbers, row of the schedule.
        chain_ids: int64 chain ids on `x`'s device, `(B,)`, or `(1,)` for the id of the first of consecutive ones.
        schedule: a float32 table of one row an update, `(S, n)` or `(S, B, n)`; later updates use the last row.
        step: the step in `key`, on the host, so that its range can be checked without a sync.
        conditions: tensors `(B, ...)` of any dtype, one row for each chain; the energy is called with them.
        sampler: the class whose state this is, by name; others refuse it. An empty one stands for whichever sampler
            takes it, as in states that were saved before this field was.
    """

    x: Tensor
    key: Tensor
    chain_ids: Tensor
    schedule: Tensor
    step: int
    conditions: tuple[Tensor, ...] = field(default=(), kw_only=True)
    sampler: str = field(default="", kw_only=True)

    def rows(self, first: int, last: int) -> Self:
        """The state of the chains `first` to `last - 1`, with their ids. `x` is a view, `key` is a copy.

        So are all tensors with a row for each chain views; the others are shared.
        """
        count = self.x.shape[0]

        def part(name: str, value: Any) -> Any:
            if name == "key":
                return value.clone()
            if name == "chain_ids":
                return value[first:last] if value.shape[0] == count else value + first
            if name in self._tables():
                return (
                    value[:, first:last] if isinstance(value, Tensor) and value.dim() == self._tables()[name] else value
                )
            if isinstance(value, tuple):
                return tuple(each[first:last] for each in value)
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == count:
                return value[first:last]
            return value

        return replace(self, **{f.name: part(f.name, getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def _tables(cls) -> dict[str, int]:
        """Tables with a row for each update, and how many dimensions those with a column for each chain have."""
        return {"schedule": 3}

    def state_dict(self) -> dict[str, Any]:
        """The fields that are set, by name: tensors (not copied), numbers, the tuple of `conditions`, and `sampler`."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: v for n, v in found.items() if isinstance(v, Tensor) or v not in (None, (), "")}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device | str | None = None) -> Self:
        """The inverse of `state_dict`, on `device`; by default on the device of `x`.

        Raises ValueError for what is not the state of a chain: missing or unknown fields, tensors of a wrong type or
        shape, numbers out of range, a step and a key that disagree.
        """
        try:
            return cls._from_fields(state, device)
        except TypeError as error:
            raise ValueError(f"not the state of a chain: {error}") from None

    @classmethod
    def _from_fields(cls, state: Mapping[str, Any], device: torch.device | str | None) -> Self:
        if not isinstance(state, Mapping):
            raise TypeError(f"it must be a mapping of its fields, got {type(state).__name__}")
        state = {name: value for name, value in state.items() if value is not None}
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in state]
        unknown = sorted(map(str, set(state) - {f.name for f in fields(cls)}))
        if missing or unknown:
            raise ValueError(f"not the state of a chain: missing {missing}, unknown {unknown}")
        kinds = get_type_hints(cls)
        names = [f.name for f in fields(cls) if f.name in state and kinds[f.name] in (Tensor, Tensor | None)]
        for name in names:
            if not isinstance(state[name], Tensor):
                raise ValueError(f"a chain's {name} is a tensor, got {type(state[name]).__name__}")
            if state[name].layout is not torch.strided or state[name].is_meta:
                raise ValueError(f"a chain's {name} is a dense tensor that holds values, got {shown(state[name])}")
        device = state["x"].device if device is None else device
        read: dict[str, Any] = {name: state[name].detach().to(device) for name in names}
        given = as_conditions(state.get("conditions", ()), state["x"].shape[0] if state["x"].ndim else 0)
        read["conditions"] = tuple(condition.detach().to(device) for condition in given)
        for name in state:
            if kinds[name] is float:
                read[name] = as_real(name, state[name])
            if kinds[name] is str and not isinstance(state[name], str):
                raise TypeError(f"its {name} is a name, got {shown(state[name])}")
        loaded = cls(**{**state, **read, "step": as_int("step", state["step"])})
        loaded.check()
        seed, step, index = loaded.key.tolist()
        if step != loaded.step:
            raise ValueError(f"the chain's key stands at step {step} but its step is {loaded.step}")
        return replace(loaded, key=rng.make_key(seed, step, index, device=loaded.x.device))

    def check(self) -> None:
        """Raises ValueError or TypeError where fields don't fit one another or are out of range. Reads all tables."""
        check_address(self.key, self.chain_ids, self.x.shape[0])
        rng.make_chain_ids(
            self.chain_ids.cpu() if self.chain_ids.shape[0] != 1 else int(self.chain_ids), self.x.shape[0]
        )


def copied(state: State) -> State:
    """A state whose tensors of chains and key are copies, which may be overwritten."""
    shared = ("chain_ids", "schedule", "conditions", "mask", "known", "inverse_mass", "temperature")
    values = {f.name: getattr(state, f.name) for f in fields(state) if f.name not in shared}
    changed: dict[str, Any] = {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}
    return replace(state, **changed)


@dataclass(frozen=True, eq=False)
class ChainState(SamplerState):
    """All that the next update of `B` Langevin chains depends on, besides the energy and the sampler's options.

    Attributes (besides those of `SamplerState`):
        schedule: float32 `(S, 2)` or `(S, B, 2)` rows of (step size, noise std); later updates use the last row.
        mask, known: where `mask` (bool) is True, every update ends at `known`; both have the shape of `x`.
        data_target, data_term_weight, data_term_hinge: the data term, `weight * (x - data_target)` in the gradient of
            the samples with `||x - data_target||**2 > hinge`; the weights are a float32 table `(S,)`.
        momentum: x's shape, of samplers with momentum.
        second_moment: x's shape, of a preconditioner "rms".
        gradient_variance: x's shape, of a noise correction.
    """

    mask: Tensor | None = None
    known: Tensor | None = None
    data_target: Tensor | None = None
    data_term_weight: Tensor | None = None
    data_term_hinge: float = 0.0
    momentum: Tensor | None = None
    second_moment: Tensor | None = None
    gradient_variance: Tensor | None = None

    @classmethod
    def _tables(cls) -> dict[str, int]:
        return {"schedule": 3, "data_term_weight": 2}

    def check(self) -> None:
        options = [getattr(self, name, None) for name in StepOptions._fields]  # a sampler's own options are not here
        check_update("langevin_step", self.x, self.x, StepOptions._make(options))
        super().check()
        for name in ("momentum", "second_moment", "gradient_variance"):
            value = getattr(self, name)
            if value is not None and (value.shape, value.dtype) != (self.x.shape, self.x.dtype):
                raise ValueError(f"a chain's {name} must be like x, got {shown(value)}")
        step_size, noise_std = self.schedule.unbind(-1)
        if not bool(((step_size > 0) & (noise_std >= 0) & self.schedule.isfinite().all(-1)).all()):
            raise ValueError("a chain's schedule has finite step sizes > 0 and noise stds >= 0, got others")
        weights = self.data_term_weight
        if not math.isfinite(self.data_term_hinge) or (
            weights is not None and not bool(((weights >= 0) & weights.isfinite()).all())
        ):
            raise ValueError("a chain's data term has finite weights >= 0 and a finite hinge, got others")


@dataclass(frozen=True, eq=False)
class StepInfo:
    """One update: energies `(B,)` and gradient (like `x`) at the state before it, and the states before and after."""

    energy: Tensor
    gradient: Tensor
    before: Tensor
    after: Tensor

    @property
    def gradient_norm(self) -> Tensor:
        """`||gradient||` of each sample, `(B,)`, before any clipping."""
        return _norm_of_each(self.gradient)

    @property
    def displacement(self) -> Tensor:
        """`||after - before||` of each sample, `(B,)`."""
        return _norm_of_each(self.after - self.before)


def _norm_of_each(values: Tensor) -> Tensor:
    wide = values if values.dtype == torch.float64 else values.float()
    return wide.reshape(values.shape[0], math.prod(values.shape[1:])).norm(dim=1)
