"""The flight recorder of a trainer: keeps what the last updates were like in memory, and changes nothing in them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastebm.sampling import Langevin
from fastebm.sampling.diagnostics import ChainReadings
from fastebm.sampling.diagnostics.readings import READ
from fastebm.sampling.state import ChainState
from fastebm.training.trainer.flight.record import Array, ChainRecord, FlightRecord

DETAILED_EVERY = 5
"""Gradients of chains are read in one of so many updates, as they cost some 3% of one of 8x8 images, and in each update
that follows larger energies than usual."""
ALARM, USUAL = 2.0, 20
"""How many times as large as their median over so many updates the largest energies must be for that."""

Readings = Callable[[Langevin, ChainState, int], ChainReadings | None]


@dataclass
class _Update:
    """What is known of one update; tensors stay where they are, so that nothing waits for a GPU."""

    line: dict[str, Any]
    detailed: bool
    numbers: dict[str, float] = field(default_factory=dict)
    data: Tensor | None = None
    samples: Tensor | None = None
    weight_norms: Tensor | None = None
    chains: dict[str, list[ChainReadings]] = field(default_factory=dict)


class FlightRecorder:
    """Keeps the last `length` updates.

    A trainer calls `begin` before an update, hands `readings` to its chains, and calls `finish` before the guard judges
    the update, so that a refused one is the last of the record. Weights that are checked before they are saved are
    recorded as the next update would be, and dropped where they pass.

    Args:
        length: 0 records nothing.

    Attributes:
        note: since when it records, where that is not the start of the run.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.note = ""
        self._updates: deque[_Update] = deque(maxlen=length + 1)  # and one that may be dropped
        self._names: tuple[str, ...] = ()
        self._current: _Update | None = None

    def begin(self, line: Mapping[str, Any]) -> None:
        """Begins to record an update; `line` is its line in the log so far, with its "iteration"."""
        if self.length:
            detailed = line["iteration"] % DETAILED_EVERY == 0 or self._alarmed()
            self._current = _Update(dict(line), detailed)
            self._updates.append(self._current)

    def drop(self) -> None:
        """Forgets what was begun last; nothing is recorded until the next `begin`."""
        if self._current is not None:
            self._updates.pop()
        self._current = None

    def readings(self, kind: str) -> Readings | None:
        """What reads the chains of an update that have this kind of start; None where nothing is recorded."""
        update = self._current
        if update is None:
            return None

        def read(sampler: Langevin, state: ChainState, num_steps: int) -> ChainReadings:
            found = ChainReadings(state, num_steps, norm_clip=sampler.grad_norm_clip, detailed=update.detailed)
            update.chains.setdefault(kind, []).append(found)
            return found

        return read

    def finish(
        self,
        numbers: Mapping[str, float],
        data: Tensor | None = None,
        samples: Tensor | None = None,
        net: nn.Module | None = None,
    ) -> None:
        """Records the metrics of the update, its energies of images and of chain ends, and the norms of the net."""
        update = self._current
        if update is None:
            return
        update.numbers |= numbers
        if data is not None and samples is not None:
            update.data, update.samples = data.detach().float(), samples.detach().float()
        if net is not None:
            named = dict(net.named_parameters())
            self._names = tuple(named)
            with torch.no_grad():
                update.weight_norms = torch.stack(torch._foreach_norm(list(named.values())))  # type: ignore[arg-type]

    def _alarmed(self) -> bool:
        """Whether the last update's energies are larger than usual."""
        recent = itertools.islice(reversed(self._updates), USUAL)
        largest = [update.numbers.get("largest_energy_samples", 0.0) for update in recent]
        return len(largest) > 1 and not largest[0] <= ALARM * statistics.median(largest)

    def go_back(self, iteration: int) -> None:
        """Forgets what came after an iteration to which the guard went back."""
        self._current = None
        while self._updates and self._updates[-1].line["iteration"] > iteration:
            self._updates.pop()

    def clear(self, note: str) -> None:
        """Forgets everything; `note` says why."""
        self._updates.clear()
        self._current, self.note = None, note

    def record(self) -> FlightRecord:
        """What is recorded, as arrays. Syncs with the host."""
        updates = list(self._updates)[-self.length :] if self.length else []
        lines = [update.line | update.numbers for update in updates]
        names = dict.fromkeys(name for line in lines for name in line if name != "iteration")
        kinds = dict.fromkeys(kind for update in updates for kind in update.chains)
        norms = [update.weight_norms for update in updates]
        each = _padded([None if n is None or len(n) != len(self._names) else n for n in norms], 1)
        return FlightRecord(
            np.array([line["iteration"] for line in lines], np.int64),
            {name: np.array([_number(line, name) for line in lines], np.float32) for name in names},
            _padded([update.data for update in updates], 1),
            _padded([update.samples for update in updates], 1),
            dict(zip(self._names, each.T, strict=True)) if each.size else {},
            {kind: _chains([update.chains.get(kind, []) for update in updates]) for kind in kinds},
            self.note,
        )


def _chains(updates: Sequence[list[ChainReadings]]) -> ChainRecord:
    """The chains of one kind of start, in parts and batches, as arrays."""

    def joined(name: str) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for parts in updates:
            read = [getattr(part, name) for part in parts]
            rows = min(map(len, read), default=0)  # not as many everywhere after an exception
            found.append(torch.cat([each[:rows] for each in read], 1) if read else None)
        return found

    energies = _padded(joined("energies"), 2)
    norms, curvatures, acceptance = (
        _padded(joined(name), 2, rows=rows, nan=nan)
        for name, rows, nan in (
            ("gradient_norms", 2 * READ, math.inf),
            ("step_curvatures", READ, math.nan),
            ("acceptance", READ, math.nan),
        )
    )
    return ChainRecord(energies, norms, curvatures, acceptance)


def _number(line: Mapping[str, Any], name: str) -> float:
    """A number of an update: NaN where it has none, and infinite where it is not a number."""
    value = float(line.get(name, math.nan))
    return math.inf if name in line and math.isnan(value) else value


def _padded(tensors: Sequence[Tensor | None], dimensions: int, rows: int = 0, nan: float = math.inf) -> Array:
    """The tensors as one array, filled up with NaN to their largest shape. A NaN of theirs becomes `nan`."""

    def as_array(tensor: Tensor) -> NDArray[Any]:
        return np.nan_to_num(tensor.cpu().numpy(), nan=nan, posinf=math.inf, neginf=-math.inf)

    arrays = [None if tensor is None else as_array(tensor) for tensor in tensors]
    shapes = [array.shape for array in arrays if array is not None and array.size]
    largest = [max((shape[k] for shape in shapes), default=0) for k in range(dimensions)]
    if dimensions > 1:
        largest[0] = max(largest[0], rows)
    padded = np.full((len(arrays), *largest), np.nan, np.float32)
    for row, array in zip(padded, arrays, strict=True):
        if array is not None and array.size:
            row[tuple(slice(length) for length in array.shape)] = array
    return padded
