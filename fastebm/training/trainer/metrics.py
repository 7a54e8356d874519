"""Numbers that an update of the weights reports, for the log and the guard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fastebm.runs.fields import checked, shown
from fastebm.runs.files import finite_json

Metrics = dict[str, Tensor]


def energy_update_metrics(net: nn.Module, loss: Tensor, data: Tensor, samples: Tensor) -> Metrics:
    """The metrics of an update of an energy `net`, from its loss and its energies of data and samples, (B,) each."""
    return {
        "loss": loss,
        "energy_data": data.mean(),
        "energy_samples": samples.mean(),
        "gap": samples.mean() - data.mean(),
        "largest_energy_data": data.abs().max(),
        "largest_energy_samples": samples.abs().max(),
        "gradient_norm": gradient_norm(net),
    }


def gradient_norm(net: nn.Module) -> Tensor:
    """The norm of the gradients of all parameters that have one."""
    return get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


def to_floats(metrics: Metrics) -> dict[str, float]:
    """The metrics as numbers, by one copy to the host for all of them."""
    return dict(zip(metrics, torch.stack([value.detach() for value in metrics.values()]).tolist(), strict=True))


class RunningMeans:
    """Means of numbers by name, since they were last popped."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, numbers: Mapping[str, float]) -> None:
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in numbers.items()}
        self._count += 1

    def pop(self) -> dict[str, float]:
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, as JSON values for a checkpoint."""
        return {"count": self._count, "sums": finite_json(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned. An empty mapping, from an old run, means no numbers yet.

        Raises ValueError, TypeError for anything else.
        """
        sums = checked("the sums", state.get("sums", {}), dict[str, float | None])
        count = checked("their count", state.get("count", 0), int)
        if count < 0 or (sums and not count):
            raise ValueError(f"sums of {shown(count)} numbers have no mean")
        self._sums, self._count = {name: math.nan if v is None else v for name, v in sums.items()}, count
