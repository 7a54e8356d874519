"""The processes that work together ("ranks"): which one this is, its share of the work, the exchange of results.

torchrun starts them and tells each its place by environment variables. Tensors travel by torch.distributed: by gloo
from CPU to CPU, by NCCL from GPU to GPU. Chains and images are split by their index, and an index is the id of its
random numbers, so that any number of processes computes the same bits (docs/scaling.md).

torch is imported where processes exchange something, and torch.distributed only where there are several of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LostRankError", "Ranks", "launched", "ranks"]

TIMEOUT = 1800.0
"""Seconds that a process waits for the others in one exchange."""

Result = TypeVar("Result")


class LostRankError(RuntimeError):
    """Another process ended, or did not answer in time."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together. `Ranks()` is a process alone, which exchanges nothing.

    All processes call the methods that exchange something (all but `share`) in the same order. They raise LostRankError
    where another process has ended, or doesn't come within the timeout of `launched`.

    Attributes:
        rank: the number of this process, from 0 on.
        size: how many processes there are, on all machines.
        local_rank: its number on its machine, which is also that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The indices of this rank's part of `count` items: contiguous, in the order of the ranks.

        Lengths differ by one at most. With more ranks than items, some have none.

        Example:
            >>> from fastebm.distributed import Ranks
            >>> [Ranks(rank, 4).share(10) for rank in range(4)]
            [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]
        """
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """The rows of all ranks in the order of their indices, `(count, ...)`, on every rank.

        Args:
            rows: `(len(share(count)), ...)`, of one dtype and one shape behind the first dimension on all ranks, on any
                device; contiguous or not.
            count: the number of rows of all ranks together.

        Raises ValueError where `rows` are not as many as this rank's share.
        """
        own = len(self.share(count))
        if rows.dim() == 0 or len(rows) != own:
            raise ValueError(f"rank {self.rank} has {own} of {count} rows, got a tensor of shape {tuple(rows.shape)}")
        shape = (count, *rows.shape[1:])
        if self.size == 1 or not math.prod(shape):
            return rows if self.size == 1 else rows.new_empty(shape)
        import torch

        # As bytes, because not every backend has every dtype, and as many from each rank, which all backends can do.
        width, most = math.prod(shape[1:]), -(-count // self.size)
        sent = rows.new_zeros((most, width))
        sent[:own] = rows.detach().reshape(own, width)
        received = sent.new_empty((self.size, most, width))
        _exchange(lambda group: group.all_gather(list(map(_as_bytes, received)), _as_bytes(sent)))
        lengths = [len(Ranks(rank, self.size).share(count)) for rank in range(self.size)]
        return torch.cat([part[:length] for part, length in zip(received, lengths, strict=True)]).view(shape)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank: anything that pickles. Tensors arrive on the device that they were on."""
        if self.size == 1:
            return value
        sent = [value if self.first else None]
        _exchange(lambda group: group.broadcast_object_list(sent, src=0, device="cpu"))
        return sent[0]

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        if self.size > 1:
            import torch

            _exchange(lambda group: group.all_reduce(torch.zeros(1)))

    def sum_in_order(self, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The sums over the parts of all ranks, on every rank, each added up in the order of the parts.

        With G parts in all, the sum is ((p0 + p1) + p2) + ... + p(G-1), element by element, for any number of ranks:
        its bits depend on the parts alone. A rank sends about as many bytes as in a ring all-reduce of its parts.

        Args:
            parts: of this rank, in order; the parts of rank r + 1 follow those of rank r. Each part has the same
                tensors, of the same shapes and dtypes; every rank has as many parts. None of them is changed.

        Returns the sums, of the shapes of a part's tensors. A single part of a single process is returned as it is.

        Raises ValueError for no parts, or parts of different lengths.
        """
        if not parts or any(len(part) != len(parts[0]) for part in parts):
            raise ValueError(f"parts must be one or more and have as many tensors each, got {[len(p) for p in parts]}")
        if self.size == 1:
            total = list(parts[0])
            for part in parts[1:]:
                total = [before + more for before, more in zip(total, part, strict=True)]
            return total
        kinds = {tensor.dtype for tensor in parts[0]}
        found: dict[int, Tensor] = {}
        for kind in sorted(kinds, key=str):
            places = [place for place, tensor in enumerate(parts[0]) if tensor.dtype == kind]
            sums = self._sum_flat([[part[place] for place in places] for part in parts])
            for place, total_of_place in zip(places, sums, strict=True):
                found[place] = total_of_place
        return [found[place] for place in range(len(parts[0]))]

    def _sum_flat(self, parts: list[list[Tensor]]) -> list[Tensor]:
        """`sum_in_order` of tensors of one dtype. Rank r adds up the r-th stretch of all elements."""
        import torch

        elements = sum(tensor.numel() for tensor in parts[0])
        if not elements:
            return [tensor.clone() for tensor in parts[0]]
        stretch = -(-elements // self.size)
        like = parts[0][0]
        sent = like.new_zeros((self.size, len(parts), stretch))
        for number, part in enumerate(parts):
            flat = torch.cat([tensor.detach().flatten() for tensor in part])
            flat = torch.nn.functional.pad(flat, (0, self.size * stretch - elements))
            sent[:, number] = flat.view(self.size, stretch)
        received = torch.empty_like(sent)
        _exchange(lambda group: group.all_to_all_single(_as_bytes(received), _as_bytes(sent)))
        in_order = received.flatten(0, 1)
        own = in_order[0].clone()
        for more in in_order[1:]:
            own.add_(more)
        whole = own.new_empty((self.size, stretch))
        _exchange(lambda group: group.all_gather(list(map(_as_bytes, whole)), _as_bytes(own)))
        pieces = whole.flatten()[:elements].split([tensor.numel() for tensor in parts[0]])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, parts[0], strict=True)]


def _as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, as a view of as many rows."""
    import torch

    return tensor.flatten(1).view(torch.uint8) if tensor.dim() > 1 else tensor.view(torch.uint8)


_current = Ranks()


def ranks() -> Ranks:
    """This process among those that work together: of the innermost `launched`, and `Ranks()` outside of it."""
    return _current


@contextmanager
def launched(timeout: float | None = None) -> Iterator[Ranks]:
    """Joins the processes that torchrun started, for a block. Alone, and within another such block, it does nothing.

    Within the block `ranks()` says which of them this is. A group that the caller has made by
    `torch.distributed.init_process_group` is used as it is, and stays.

    Args:
        timeout: seconds that a process waits for another one in an exchange; by default the environment variable
            FASTEBM_TIMEOUT, or 1800.

    Raises ValueError for environment variables that don't fit, and ConnectionError where the processes don't meet.

    Example:
        >>> from fastebm.distributed import launched
        >>> with launched() as ranks:
        ...     ranks.size, ranks.share(5)
        (1, range(0, 5))
    """
    global _current
    if _current.size > 1:
        yield _current
        return
    place = placed()
    if place.size == 1 and not _has_group():
        yield place
        return
    seconds = _timeout(timeout)
    before, (_current, own) = _current, _joined(place, seconds)
    try:
        yield _current
    finally:
        _current = before
        if own:
            import torch.distributed as group

            group.destroy_process_group()


def placed() -> Ranks:
    """The place that the environment variables of torchrun give this process; `Ranks()` without them.

    Raises ValueError where they don't fit each other.
    """
    names = "RANK", "WORLD_SIZE"
    given = [name for name in names if name in os.environ]
    if not given:
        return Ranks()
    if len(given) == 1:
        (missing,) = set(names) - set(given)
        raise ValueError(f"{given[0]} is set and {missing} is not: torchrun sets both, a process alone needs neither")
    rank, size, local_rank = _number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    local_size = _number("LOCAL_WORLD_SIZE", size)
    if size < 1 or rank >= size:
        raise ValueError(f"RANK must be below WORLD_SIZE, got RANK={rank} and WORLD_SIZE={size}")
    if local_rank >= max(1, local_size):
        raise ValueError(
            f"LOCAL_RANK must be below LOCAL_WORLD_SIZE, got LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_size}"
        )
    if size > 1 and (lacking := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]):
        raise ValueError(f"{size} processes need {' and '.join(lacking)} to meet: torchrun sets them")
    return Ranks(rank, size, local_rank)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name} must be a whole number, got {text!r}")
    return int(text)


def _timeout(seconds: float | None) -> float:
    text = os.environ.get("FASTEBM_TIMEOUT", "")
    try:
        found = float(text or TIMEOUT) if seconds is None else float(seconds)
    except ValueError:
        raise ValueError(f"FASTEBM_TIMEOUT must be a number of seconds, got {text!r}") from None
    if not 0 < found <= 10**9:
        raise ValueError(f"a timeout is a positive number of seconds, at most 10^9, got {found:g}")
    return found


def _has_group() -> bool:
    """Whether the caller has made a process group. Asks only where torch.distributed is imported already."""
    import sys

    group = sys.modules.get("torch.distributed")
    return group is not None and group.is_available() and group.is_initialized()


def _joined(place: Ranks, timeout: float) -> tuple[Ranks, bool]:
    """The ranks of the process group, which is made unless there is one, and whether it was."""
    from datetime import timedelta

    import torch
    import torch.distributed as group

    if not group.is_available():
        raise ValueError("this build of torch has no torch.distributed: start one process alone")
    if group.is_initialized():
        return Ranks(group.get_rank(), group.get_world_size(), place.local_rank), False
    on_gpus = torch.cuda.is_available() and group.is_nccl_available()
    if on_gpus and place.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(place.local_rank)
    try:
        group.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise ConnectionError(f"{place.size} processes could not meet at {where}: {reason}") from error
    return place, True


def _exchange(call: Callable[[Any], Result]) -> Result:
    """What `call` of torch.distributed gives. Raises LostRankError where another process does not take part."""
    import torch
    import torch.distributed as group

    try:
        with torch.no_grad():
            return call(group)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise LostRankError(
            f"another of {_current.size} processes ended or did not answer in time: {str(error).splitlines()[0]}"
        ) from error
