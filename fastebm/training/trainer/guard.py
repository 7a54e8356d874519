"""The guard: checks each update before the weights change, and chooses the checkpoint for a rollback."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fastebm import rng
from fastebm.runs.fields import checked
from fastebm.runs.folder import RunFolder
from fastebm.training.trainer.flight import WENT_BACK, read_summary, records


class DivergedError(RuntimeError):
    """Training was stopped because energies exploded or were not finite. Earlier checkpoints are good.

    Attributes:
        iteration: the number of the refused update, or of the weights that were not saved.
        reason: the metric that was out of bounds.
    """

    def __init__(self, iteration: int, reason: str, advice: str = "") -> None:
        super().__init__(f"training stopped at iteration {iteration}: {reason}{advice and f'. {advice}'}")
        self.iteration = iteration
        self.reason = reason


class Guard:
    """Checks energies, gap, loss and gradient of each update, and records how often the run was rolled back.

    It is asked before every update of the weights, and about the weights themselves before they are saved. Normal
    energies of CF-EBM nets are about 1 to 20 (2 to 17 in the logs of YangNaruto/ProEBM at 32x32, which ends a run at a
    |loss| above 1000).

    After the k-th rollback all noise has the key `fold_in_seed(seed, k)`, and learning rates are multiplied by
    `retry_lr_factor**k`. Checkpoints keep the rollbacks so far, so that a resumed run draws the same noise.

    Attributes:
        rollbacks: for each rollback its "iteration" (of the refused update), "back_to" and "reason".
    """

    def __init__(
        self,
        max_energy: float = math.inf,
        max_gap: float = math.inf,
        max_loss: float = math.inf,
        *,
        retries: int = 0,
        retry_lr_factor: float = 1.0,
    ) -> None:
        self.max_energy = max_energy
        self.max_gap = max_gap
        self.max_loss = max_loss
        self.retries = retries
        self.retry_lr_factor = retry_lr_factor
        self.rollbacks: list[dict[str, Any]] = []

    def check(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Raises DivergedError if a metric is out of bounds or not finite.

        Args:
            iteration: named in the message.
            metrics: "largest_energy_data" and "largest_energy_samples" (magnitudes) and "gradient_norm" of the weights;
                optionally "gap" and "loss".
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
        """Whether the run was rolled back as often as it may be."""
        return self.attempt >= self.retries

    @property
    def lr_factor(self) -> float:
        return self.retry_lr_factor**self.attempt

    def seed(self, seed: int) -> int:
        """The key of all noise from here on, in a run whose config has `seed`."""
        return rng.fold_in_seed(seed, self.attempt)

    def target(self, saved: Sequence[int]) -> int | None:
        """The iteration to go back to, of those `saved`, ascending; None is the start of the run.

        It is the newest, unless the last rollback went there too and no checkpoint was made since. Then it is the one
        before: a checkpoint may pass all checks and still lead to an explosion.
        """
        if not saved:
            return None
        stuck = bool(self.rollbacks) and self.rollbacks[-1]["back_to"] == saved[-1]
        return saved[-2] if stuck and len(saved) > 1 else saved[-1]

    def record_rollback(self, iteration: int, back_to: int, reason: str) -> None:
        self.rollbacks.append({"iteration": iteration, "back_to": back_to, "reason": reason})

    def state_dict(self) -> dict[str, Any]:
        """The rollbacks, as JSON values for a checkpoint."""
        return {"rollbacks": [dict(rollback) for rollback in self.rollbacks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned. An empty mapping, from an old run, means no rollbacks.

        Raises ValueError, TypeError for anything else.
        """
        rollbacks = checked("the rollbacks", state.get("rollbacks", []), list[dict[str, Any]])
        for rollback in rollbacks:
            for name, hint in (("iteration", int), ("back_to", int), ("reason", str)):
                checked(f"{name} of a rollback", rollback.get(name), hint)
        self.rollbacks = rollbacks


def saved_rollbacks(folder: RunFolder) -> int:
    """How often the guard of a run went back, by its newest checkpoint, or without one by its flight records.

    The last line of the log may say less: lines after the checkpoint to which the guard went back are removed, and a
    run that was given up soon after wrote none. Raises ValueError for a damaged state, OSError for a checkpoint that
    can't be read.
    """
    state = folder.checkpoints.newest_state()
    if state is not None:
        try:
            guard = checked("guard", state.get("guard", {}), dict[str, Any])
            return len(checked("the rollbacks", guard.get("rollbacks", []), list[dict[str, Any]]))
        except TypeError as error:
            raise ValueError(f"in the newest checkpoint {error}") from error
    events = []
    for record in records(folder.path):
        with suppress(ValueError, OSError):  # it is damaged
            events.append(read_summary(record)["event"])
    return events.count(WENT_BACK)
