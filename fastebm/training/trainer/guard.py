"""The guard: it sees every update before the weights do, and takes a run that explodes back to where it was healthy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastebm import rng


class DivergedError(RuntimeError):
    """Training was stopped because energies exploded or were not finite. Checkpoints made before are good.

    Attributes:
        iteration: where.
        reason: what the guard saw.
    """

    def __init__(self, iteration: int, reason: str, advice: str = "") -> None:
        super().__init__(f"training stopped at iteration {iteration}: {reason}{advice and f'. {advice}'}")
        self.iteration = iteration
        self.reason = reason


class Guard:
    """Watches energies, gap, loss and gradient, and remembers how often the run had to go back.

    It looks before every update of the weights, and at the weights themselves before they are saved. Healthy energies
    of CF-EBM nets are about 1 to 20 (2 to 17 in the logs of YangNaruto/ProEBM at 32x32, where a |loss| above 1000 ends
    a run).

    After the k-th rollback all noise has the key `fold_in_seed(seed, k)`, and the learning rate the factor `rate**k`.
    The rollbacks so far are part of a checkpoint, so that a resumed run goes on with the same noise.

    Attributes:
        rollbacks: for each: "iteration" (where it went wrong), "back_to" and "reason".
    """

    def __init__(
        self,
        max_energy: float,
        max_gap: float = math.inf,
        max_loss: float = math.inf,
        *,
        retries: int = 0,
        rate: float = 1.0,
    ) -> None:
        self.max_energy = max_energy
        self.max_gap = max_gap
        self.max_loss = max_loss
        self.retries = retries
        self.rate = rate
        self.rollbacks: list[dict[str, Any]] = []

    def check(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Raises DivergedError if anything is not healthy.

        Args:
            iteration: for the message.
            metrics: "largest_energy_data" and "largest_energy_samples" (magnitudes) and "gradient_norm" of the weights;
                and, where they are known, "gap" and "loss".
        """
        for source in ("data", "samples"):
            largest = metrics[f"largest_energy_{source}"]
            if not math.isfinite(largest):
                raise DivergedError(iteration, f"an energy of {source} is {largest}")
            if largest > self.max_energy:
                magnitude = f"has the magnitude {largest:.4g}, more than max_energy = {self.max_energy:g}"
                raise DivergedError(iteration, f"an energy of {source} {magnitude}")
        for name, bound in (("gap", self.max_gap), ("loss", self.max_loss)):
            if not abs(value := metrics.get(name, 0.0)) <= bound:
                raise DivergedError(iteration, f"the {name} is {value:.4g}, beyond max_{name} = {bound:g}")
        norm = metrics["gradient_norm"]
        if not math.isfinite(norm):
            raise DivergedError(iteration, f"the gradient of the weights has the norm {norm}")

    @property
    def attempt(self) -> int:
        return len(self.rollbacks)

    @property
    def exhausted(self) -> bool:
        """Whether the run has gone back as often as it may."""
        return self.attempt >= self.retries

    @property
    def lr_factor(self) -> float:
        return self.rate**self.attempt

    def seed(self, seed: int) -> int:
        """The key of all noise from here on, for a run whose config has `seed`."""
        return rng.fold_in_seed(seed, self.attempt)

    def target(self, saved: Sequence[int]) -> int | None:
        """The iteration to go back to, of those `saved`, ascending; None is the start of the run.

        The newest, unless the run went back there last time and has come no further since: then the one before it,
        because a checkpoint can be healthy to look at and past saving.
        """
        if not saved:
            return None
        stuck = bool(self.rollbacks) and self.rollbacks[-1]["back_to"] == saved[-1]
        return saved[-2] if stuck and len(saved) > 1 else saved[-1]

    def record_rollback(self, iteration: int, back_to: int, reason: str) -> None:
        self.rollbacks.append({"iteration": iteration, "back_to": back_to, "reason": reason})

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"rollbacks": [dict(rollback) for rollback in self.rollbacks]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave; an empty mapping, of a run from before there were rollbacks, is none."""
        self.rollbacks = [dict(rollback) for rollback in state.get("rollbacks", [])]
