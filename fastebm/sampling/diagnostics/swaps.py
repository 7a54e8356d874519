"""How often neighbouring rungs of a ladder of temperatures exchanged: counts for each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fastebm.scalars import shown


@dataclass(frozen=True, eq=False)
class SwapSummary:
    """Exchanges between rung p and p + 1 of a ladder: int64 `(P,)` counts of tries and of those accepted."""

    attempted: Tensor
    accepted: Tensor

    @property
    def acceptance(self) -> Tensor:
        """Accepted over attempted, float64 `(P,)`; NaN where no exchange was tried."""
        return self.accepted.double() / self.attempted


class SwapCounter:
    """Counts exchanges on the device. Their number of pairs is that of the first call of `update`.

    Example:
        >>> import torch, fastebm
        >>> swaps = fastebm.diagnostics.SwapCounter()
        >>> swaps.update(torch.tensor([True, False]), torch.tensor([[True, False], [False, False]]))
        >>> swaps.summary().acceptance
        tensor([0.5000,    nan], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self._counts: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def update(self, attempted: Tensor, accepted: Tensor) -> None:
        """Counts the exchanges of one round: bool `(P,)`, or `(..., P)` for several ladders; they broadcast. Or of
        several rounds: int64 counts of the same shapes.

        Raises TypeError or ValueError for others. An exchange that was not attempted does not count as accepted.
        """
        for name, value in (("attempted", attempted), ("accepted", accepted)):
            if not isinstance(value, Tensor) or value.dtype not in (torch.bool, torch.int64) or not value.dim():
                raise TypeError(f"{name} must be a bool or int64 tensor (..., P), got {shown(value)}")
        if attempted.shape[-1] != accepted.shape[-1]:
            raise ValueError(
                f"attempted and accepted must be of as many pairs, got {attempted.shape[-1]} and {accepted.shape[-1]}"
            )
        attempted, accepted = torch.broadcast_tensors(attempted.long(), accepted.long())
        pairs = attempted.shape[-1]
        tried, done = (each.reshape(-1, pairs).sum(0) for each in (attempted, torch.minimum(attempted, accepted)))
        if self._counts is None:
            self._counts = torch.zeros_like(tried), torch.zeros_like(done)
        if len(self._counts[0]) != pairs:
            raise ValueError(f"earlier rounds had {len(self._counts[0])} pairs of rungs, this one has {pairs}")
        for total, count in zip(self._counts, (tried, done), strict=True):
            total += count

    def summary(self) -> SwapSummary | None:
        """The counts so far; None where no round was counted."""
        return None if self._counts is None else SwapSummary(*(count.clone() for count in self._counts))

    def state_dict(self) -> dict[str, Tensor]:
        """The counts by name, not copied; empty where no round was counted."""
        return {} if self._counts is None else dict(zip(("attempted", "accepted"), self._counts, strict=True))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device | str | None = None) -> Self:
        """The inverse of `state_dict`, with copies. Raises ValueError for anything else."""
        counter = cls()
        if not isinstance(state, Mapping):
            raise ValueError(f"not the state of a counter of swaps: {shown(state)}")
        if not state:
            return counter
        counts = [state.get(name) for name in ("attempted", "accepted")]
        shapes = {(*each.shape,) if isinstance(each, Tensor) and each.dtype == torch.int64 else None for each in counts}
        if len(state) != 2 or None in shapes or len(shapes) != 1 or len(next(iter(shapes)) or ()) != 1:
            raise ValueError("not the state of a counter of swaps: it has int64 attempted (P,) and accepted (P,)")
        attempted, accepted = (each.to(device, copy=True) for each in counts if isinstance(each, Tensor))
        counter._counts = attempted, accepted
        return counter

    @classmethod
    def concatenate(cls, counters: Sequence[SwapCounter]) -> Self:
        """The counts of all, added up. Raises ValueError for ladders of different lengths."""
        total = cls()
        counts = [counter._counts for counter in counters if counter._counts is not None]
        if len({len(tried) for tried, _ in counts}) > 1:
            raise ValueError(f"ladders must be of one length, got {sorted({len(tried) for tried, _ in counts})} pairs")
        for tried, done in counts:
            before = total._counts or (torch.zeros_like(tried), torch.zeros_like(done))
            total._counts = before[0] + tried, before[1] + done
        return total
