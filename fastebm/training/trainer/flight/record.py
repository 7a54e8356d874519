"""A flight record: the numbers of the last updates of a run, as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEEP = 2.0
"""Step size times curvature, above which a descent overshoots."""

Array = NDArray[np.float32]

_OF_CHAINS = ("energies", "gradient_norms", "step_curvatures", "acceptance")


@dataclass(frozen=True)
class ChainRecord:
    """The chains of one kind of start in U updates, at the resolution in training; NaN where there is no number.

    Attributes:
        energies: before each of n steps, (U, n, B).
        gradient_norms: `||grad E||` before the first two and the last two steps, (U, 4, B).
        step_curvatures: step size times curvature along the first step and the last but one, (U, 2, B).
        acceptance: the Metropolis acceptance of these two steps as proposals, (U, 2, B).
    """

    energies: Array
    gradient_norms: Array
    step_curvatures: Array
    acceptance: Array

    @property
    def rising(self) -> Array:
        """The share of steps that raised the energy, in each update (U,)."""
        with np.errstate(invalid="ignore"):  # between two infinite ones
            changes = np.diff(self.energies, axis=1)
        return mean(np.where(np.isnan(changes), np.nan, changes > 0))

    @property
    def largest_curvatures(self) -> Array:
        """The larger step size times curvature of each chain, (U, B)."""
        return np.fmax.reduce(self.step_curvatures, axis=1, initial=np.nan)

    @property
    def steep(self) -> Array:
        """The share of chains with a step size times curvature above 2, in each update (U,)."""
        largest = self.largest_curvatures
        with np.errstate(invalid="ignore"):
            return mean(np.where(np.isnan(largest), np.nan, largest > STEEP))


@dataclass(frozen=True)
class FlightRecord:
    """What the last U updates of a run were like; the last of them may be one that the guard refused.

    NaN stands for what was not measured, and an infinite value for an energy or a metric that was not a number.

    Attributes:
        iterations: the numbers of the updates, (U,), ascending.
        numbers: metrics and settings by name, (U,) each.
        data, samples: energies of the images and of the chain ends of each update, (U, B).
        weight_norms: the norms of the energy's parameters by name, (U,) each.
        chains: by kind of start.
        note: what the record does not have, in words.
    """

    iterations: NDArray[np.int64]
    numbers: dict[str, Array]
    data: Array
    samples: Array
    weight_norms: dict[str, Array] = field(default_factory=dict)
    chains: dict[str, ChainRecord] = field(default_factory=dict)
    note: str = ""

    def __len__(self) -> int:
        return len(self.iterations)

    @property
    def weight_norm(self) -> Array:
        """The norm of all parameters of the energy together, (U,)."""
        if not self.weight_norms:
            return np.full(len(self), np.nan, np.float32)
        return np.sqrt(np.square(np.stack([*self.weight_norms.values()])).sum(0))

    def lines(self) -> list[dict[str, Any]]:
        """The numbers of each update as JSON values, those of chains as medians and shares by kind of start."""
        columns: dict[str, NDArray[Any]] = {"iteration": self.iterations, **self.numbers}
        if self.weight_norms:
            columns["weight_norm"] = self.weight_norm
        for kind, chains in self.chains.items():
            columns |= {
                f"{kind}_energy_start": mean(chains.energies[:, :1]),
                f"{kind}_energy_end": mean(chains.energies[:, -1:]),
                f"{kind}_rising": chains.rising,
                f"{kind}_steep": chains.steep,
                f"{kind}_step_curvature": median(chains.largest_curvatures),
                f"{kind}_gradient_norm": median(chains.gradient_norms),
                f"{kind}_acceptance": mean(chains.acceptance),
            }
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return [{name: value for name, value in zip(columns, row, strict=True) if not _missing(value)} for row in rows]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything but the note, by name."""
        named: dict[str, NDArray[Any]] = {"iterations": self.iterations, "data": self.data, "samples": self.samples}
        named |= {f"numbers/{name}": values for name, values in self.numbers.items()}
        named |= {f"weight_norms/{name}": values for name, values in self.weight_norms.items()}
        for kind, chains in self.chains.items():
            named |= {f"chains/{kind}/{name}": getattr(chains, name) for name in _OF_CHAINS}
        return named

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], note: str = "") -> FlightRecord:
        """The record that `arrays` came from. Raises KeyError where some are missing."""
        kinds = dict.fromkeys(name.split("/")[1] for name in arrays if name.startswith("chains/"))

        def below(prefix: str) -> dict[str, Array]:
            return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}

        return cls(
            arrays["iterations"],
            below("numbers/"),
            arrays["data"],
            arrays["samples"],
            below("weight_norms/"),
            {kind: ChainRecord(*(arrays[f"chains/{kind}/{name}"] for name in _OF_CHAINS)) for kind in kinds},
            note,
        )


def mean(values: NDArray[Any]) -> Array:
    """The mean over all but the first axis, without what is NaN; NaN where nothing is left."""
    flat = values.reshape(len(values), -1)
    there = ~np.isnan(flat)
    count = there.sum(1)
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.where(there, flat, 0).astype(np.float64).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def median(values: NDArray[Any]) -> Array:
    """The median over all but the first axis, without what is NaN; NaN where nothing is left."""
    rows = (row[~np.isnan(row)] for row in values.reshape(len(values), -1))
    return np.array([np.median(row) if len(row) else np.nan for row in rows], np.float32)


def _missing(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
