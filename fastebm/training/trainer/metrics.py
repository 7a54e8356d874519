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


class LogNumbers:
    """Numbers by name since they were last popped: the largest of those of `largest_...`, the means of others."""

    LARGEST = "largest_"

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._largest: dict[str, float] = {}
        self._count = 0

    def add(self, numbers: Mapping[str, float]) -> None:
        sums, largest = self._sums, self._largest
        self._sums = {n: sums.get(n, 0.0) + value for n, value in numbers.items() if not n.startswith(self.LARGEST)}
        self._largest = {n: _larger(largest.get(n), v) for n, v in numbers.items() if n.startswith(self.LARGEST)}
        self._count += 1

    def pop(self) -> dict[str, float]:
        found = {name: total / self._count for name, total in self._sums.items()} | self._largest
        self._sums, self._largest, self._count = {}, {}, 0
        return found

    def state_dict(self) -> dict[str, Any]:
        """The sums and the largest so far, as JSON values for a checkpoint."""
        return {"count": self._count, "sums": finite_json(self._sums), "largest": finite_json(self._largest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned. An empty mapping, from an old run, means no numbers yet.

        Raises ValueError, TypeError for anything else.
        """
        sums = checked("the sums", state.get("sums", {}), dict[str, float | None])
        count = checked("their count", state.get("count", 0), int)
        if count < 0 or (sums and not count):
            raise ValueError(f"sums of {shown(count)} numbers have no mean")
        largest = checked("the largest", state.get("largest", {}), dict[str, float | None])
        # Older runs have sums of these too, of which the mean is the nearest to the largest that is known.
        largest = {n: v if v is None else v / count for n, v in sums.items() if n.startswith(self.LARGEST)} | largest
        sums = {name: value for name, value in sums.items() if not name.startswith(self.LARGEST)}
        self._sums, self._largest = (
            {name: math.nan if value is None else value for name, value in each.items()} for each in (sums, largest)
        )
        self._count = count


def _larger(before: float | None, value: float) -> float:
    """The larger of two numbers; NaN where one is, as that is what went wrong."""
    return value if before is None or math.isnan(value) else before if math.isnan(before) else max(before, value)
