"""The explicit state of a batch of chains, and what one update reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastebm import rng

_TENSORS = ("x", "key", "chain_ids", "schedule", "mask", "known", "data_target", "data_term_weight")
_REQUIRED = ("x", "key", "chain_ids", "schedule", "step")


@dataclass(frozen=True, eq=False)
class ChainState:
    """All that the next update of `B` chains depends on, besides the energy and the sampler's options.

    Attributes:
        x: the states `(B, ...)`, float32 or float64.
        key: int64 `(3,)` on `x`'s device: seed, step of the random numbers, row of the schedule.
        chain_ids: int64 chain ids on `x`'s device, `(B,)`, or `(1,)` for the id of the first of consecutive ones.
        schedule: float32 `(S, 2)` or `(S, B, 2)` rows of (step size, noise std); later updates use the last row.
        step: the step in `key`, on the host, so that its range can be checked without a sync.
        mask, known: where `mask` (bool) is True, every update ends at `known`; both have the shape of `x`.
        data_target, data_term_weight, data_term_hinge: the data term, `weight * (x - data_target)` in the gradient of
            the samples with `||x - data_target||**2 > hinge`; the weights are a float32 table `(S,)`.
    """

    x: Tensor
    key: Tensor
    chain_ids: Tensor
    schedule: Tensor
    step: int
    mask: Tensor | None = None
    known: Tensor | None = None
    data_target: Tensor | None = None
    data_term_weight: Tensor | None = None
    data_term_hinge: float = 0.0

    def rows(self, first: int, last: int) -> ChainState:
        """The state of the chains `first` to `last - 1`, with their ids. `x` is a view, `key` is a copy."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[first:last]

        return replace(
            self,
            x=self.x[first:last],
            key=self.key.clone(),
            chain_ids=self.chain_ids[first:last]
            if self.chain_ids.shape[0] == self.x.shape[0]
            else self.chain_ids + first,
            schedule=self.schedule[:, first:last] if self.schedule.dim() == 3 else self.schedule,
            mask=part(self.mask),
            known=part(self.known),
            data_target=part(self.data_target),
        )

    def state_dict(self) -> dict[str, Any]:
        """The fields that are set, by name: tensors (not copied), the int `step` and the float `data_term_hinge`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device | str | None = None) -> ChainState:
        """The inverse of `state_dict`, on `device`; by default on the device of the tensors.

        Raises ValueError for missing or unknown fields, and if step and key disagree.
        """
        missing = [name for name in _REQUIRED if name not in state]
        unknown = sorted(set(state) - {f.name for f in fields(cls)})
        if missing or unknown:
            raise ValueError(f"not the state of a chain: missing {missing}, unknown {unknown}")
        for name in _TENSORS:
            if name in state and not isinstance(state[name], Tensor):
                raise ValueError(f"a chain's {name} is a tensor, got {type(state[name]).__name__}")
        seed, step, index = state["key"].tolist()
        if step != state["step"]:
            raise ValueError(f"the chain's key stands at step {step} but its step is {state['step']}")
        tensors = {name: state[name].to(device) for name in _TENSORS if name in state}
        tensors["key"] = rng.make_key(seed, step, index, device=tensors["x"].device)
        return cls(**{**state, **tensors})


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
