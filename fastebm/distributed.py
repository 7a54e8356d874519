"""The processes that work together ("ranks"): which one this is, its share of the work, the exchange of results.

torchrun starts them and tells each its place by environment variables. Tensors travel by torch.distributed: by gloo
from CPU to CPU, by NCCL from GPU to GPU. Chains and images are split by their index, and an index is the id of its
random numbers, so that any number of processes computes the same bits (docs/scaling.md).

A command that works over ranks runs on rank 0 alone (`led`), which reads, checks, prints and writes. Where the work is
heavy it calls a function by `together`: all ranks then call that function with the same arguments, and within it each
loop over rows (`shared_rows`: chains, images) computes this rank's share and gathers the results. So a command and the
functions below it are written for one process.

torch is imported where processes exchange something, and torch.distributed only where there are several of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import pickle
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LostRankError", "OnFirst", "Ranks", "launched", "led", "ranks", "shared_rows", "together"]

TIMEOUT = 1800.0
"""Seconds that a process waits for the others in one exchange."""
MEETING = 300.0
"""Seconds that processes wait for each other at the start, at most."""
ORDERS = timedelta(days=365)
"""How long a rank waits for rank 0 to call it: however long that reads, draws and writes alone."""

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
        local_size: how many there are on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

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
        return rows if self.size == 1 else self._gather(rows, self._lengths(count))

    def _lengths(self, count: int, block: int = 1) -> list[int]:
        """How many of `count` rows each rank has, where they are split between blocks of so many rows."""
        blocks = -(-count // block)
        shares = [Ranks(rank, self.size).share(blocks) for rank in range(self.size)]
        return [min(count, share.stop * block) - min(count, share.start * block) for share in shares]

    def _gather(self, rows: Tensor, lengths: list[int]) -> Tensor:
        """The rows of all ranks, of which each has so many."""
        import torch

        shape, own, most = (sum(lengths), *rows.shape[1:]), lengths[self.rank], max(lengths)
        if not math.prod(shape):
            return rows.new_empty(shape)
        # As bytes, because not every backend has every dtype, and as many from each rank, which all backends can do.
        width = math.prod(shape[1:])
        sent = rows.new_zeros((most, width))
        sent[:own] = rows.detach().reshape(own, width)
        received = sent.new_empty((self.size, most, width))
        _exchange(lambda group: group.all_gather(list(map(_as_bytes, received)), _as_bytes(sent)))
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

            _exchange(lambda group: group.all_reduce(torch.zeros(1, device="cpu")))

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


@dataclass
class _Group:
    """What this process has joined.

    Attributes:
        ranks: its place.
        store: small values that all processes read and write; None in a group that the caller made.
        timeout: seconds that it waits for the others.
        orders: the process group of rank 0's calls; None where it makes none.
        sharing: whether loops over rows are split at this moment.
        serving: whether the other ranks wait for calls at this moment, on rank 0.
    """

    ranks: Ranks
    store: Any = None
    timeout: float = TIMEOUT
    orders: Any = None
    sharing: bool = False
    serving: bool = False


_group = _Group(Ranks())
_told = False


def ranks() -> Ranks:
    """This process among those that work together: of the innermost `launched`, and `Ranks()` outside of it."""
    return _group.ranks


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
    global _group
    if _group.ranks.size > 1:
        yield _group.ranks
        return
    place = placed()
    if place.size == 1 and not _has_group():
        yield place
        return
    before, (_group, own) = _group, _joined(place, _timeout(timeout))
    try:
        yield _group.ranks
    finally:
        _group = before
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
    _number("MASTER_PORT", 0)
    return Ranks(rank, size, local_rank, local_size)


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
    group = sys.modules.get("torch.distributed")
    return group is not None and group.is_available() and group.is_initialized()


def _joined(place: Ranks, timeout: float) -> tuple[_Group, bool]:
    """The process group, which is made unless there is one, and whether it was."""
    import torch
    import torch.distributed as group

    if not group.is_available():
        raise ValueError("this build of torch has no torch.distributed: start one process alone")
    if group.is_initialized():
        return _Group(Ranks(group.get_rank(), group.get_world_size(), place.local_rank, place.local_size)), False
    from torch.distributed.rendezvous import rendezvous

    on_gpus = torch.cuda.is_available() and group.is_nccl_available()
    if on_gpus and place.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(place.local_rank)
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=min(timeout, MEETING))))
        store = group.PrefixStore(_meeting(store, place, min(timeout, MEETING)), store)
        group.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise ConnectionError(f"{place.size} processes could not meet at {where}: {reason}") from error
    return _Group(place, store, timeout), True


def _meeting(store: Any, place: Ranks, timeout: float) -> str:
    """A name that all processes of this meeting agree on, and that no earlier one had.

    torchrun keeps its store when it starts processes again, with the addresses of those that have ended: a process that
    took those would wait for the dead. So each writes a word of its own, rank 0 puts all words together, and when each
    has found its own among them and said so, those are the processes of this meeting.
    """
    word, end = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"word {place.rank}", word)
    while time.monotonic() < end:
        if place.first:
            words = b" ".join(store.get(f"word {rank}") for rank in range(place.size))
            store.set("words", words)
            agreed = [f"agreed {rank}" for rank in range(1, place.size)]
            if all(store.check([key]) and store.get(key) == words for key in agreed):
                store.set("met", words)
                return hashlib.sha256(words).hexdigest()
        elif store.check(["words"]) and (words := store.get("words")).split()[place.rank : place.rank + 1] == [
            word.encode()
        ]:
            store.set(f"agreed {place.rank}", words)
            if store.check(["met"]) and store.get("met") == words:
                return hashlib.sha256(words).hexdigest()
        time.sleep(0.01)
    raise ConnectionError(f"not all of {place.size} processes have come within {timeout:g} s")


def speaks(error: BaseException) -> bool:
    """Whether this process is the one that tells of an error: the first of all that asks. The others stay silent.

    Before the processes have met, and where they can't ask any more, it is rank 0; of a lost rank, anybody tells then.
    """
    global _told
    _told = says_first("an error", otherwise=isinstance(error, LostRankError))
    return _told


def says_first(text: str, *, otherwise: bool = False) -> bool:
    """Whether this process is the first of all to say a text. Where it can't ask, rank 0 is, and `otherwise` others."""
    if _group.store is None:
        return _place_or_alone().first
    try:
        return bool(_group.store.add(text, 1) == 1)
    except RuntimeError:
        return _group.ranks.first or otherwise


def told() -> bool:
    """Whether this process is alone, or told of an error."""
    return _told or _place_or_alone().size == 1


def _place_or_alone() -> Ranks:
    try:
        return placed()
    except ValueError:
        return Ranks()


def led(command: Callable[[], int]) -> int:
    """The exit code of a command that rank 0 runs. The others do what it calls by `together`, until it has ended."""
    if _group.ranks.size == 1:
        return command()
    import torch.distributed as group

    _group.orders = group.new_group(backend="gloo", timeout=ORDERS)
    if not _group.ranks.first:
        return _serve()
    code, _group.serving = 1, True
    try:
        code = command()
        return code
    finally:
        if _group.serving:  # else an exchange was broken off, and they do not listen
            _order(code)


def together(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """`function(*arguments, **options)`, called by all ranks with loops over rows split between them; rank 0's result.

    All of it must pickle; tensors on a GPU arrive on the GPU of each rank. An exception of any rank is raised here.
    Outside of `led`, and within such a call, it is a plain call.
    """
    if not _group.serving:
        return function(*arguments, **options)
    import torch

    packed = io.BytesIO()
    torch.save((function, arguments, options, torch.get_rng_state()), packed)
    _group.serving = False  # until all have ended the call
    _order(packed.getvalue())
    try:
        result = _jointly(lambda: function(*arguments, **options))
    except LostRankError:
        raise
    except Exception:
        _group.serving = True
        raise
    _group.serving = True
    return result


class OnFirst(Generic[Result]):
    """An argument of `together` that stays on rank 0. Elsewhere its `value` is None."""

    def __init__(self, value: Result | None) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return OnFirst, (None,)


def shared_rows(count: int, compute: Callable[[range], Result], block: int = 1) -> Result:
    """What `compute` gives for the rows from 0 to `count - 1`: within `together`, each rank computes its share.

    Args:
        compute: gives a tensor `(len(rows), ...)` for a range of rows, or a tuple, list, dict or dataclass of such
            tensors or None. Loops within it are not split again. It may be called for rows that are not its rank's,
            where there are more ranks than rows.
        block: rows are split between blocks of so many. With the size of the batches, these are those of one process:
            then nets whose rounding depends on the batch give its bits too.
    """
    if not _group.sharing or not count:
        return compute(range(count))
    lengths = _group.ranks._lengths(count, block)
    first, own = sum(lengths[: _group.ranks.rank]), lengths[_group.ranks.rank]
    _group.sharing = False
    try:
        # Not for no rows at all: the result must have the others' shape.
        found = compute(range(first, first + own) if own else range(min(block, count)))
    except LostRankError:
        raise
    except Exception as error:
        _agree(error)
        raise
    finally:
        _group.sharing = True
    _agree(None)
    return _gathered(found, lengths)


def _gathered(found: Any, lengths: list[int]) -> Any:
    if found is None:
        return None
    if isinstance(found, dict):
        return {name: _gathered(value, lengths) for name, value in found.items()}
    if isinstance(found, tuple | list):
        whole = [_gathered(value, lengths) for value in found]
        return type(found)(*whole) if hasattr(found, "_fields") else type(found)(whole)
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return dataclasses.replace(found, **_gathered(vars(found), lengths))
    return _group.ranks._gather(found[: lengths[_group.ranks.rank]], lengths)


def _jointly(call: Callable[[], Result]) -> Result:
    """The result of a call that all ranks make at this moment. Raises the exception of any of them on all.

    Each rank goes through the same agreements, in the same order: one in each `shared_rows`, and one at the end. A rank
    that fails goes to its next one with its exception, and the call ends there on all ranks.
    """
    _group.sharing = True
    try:
        try:
            result = call()
        except LostRankError:
            raise
        except Exception as error:
            _agree(error)
            raise
        _agree(None)
        return result
    except _AgreedError as agreed:
        raise agreed.failure from None
    finally:
        _group.sharing = False


class _AgreedError(BaseException):
    """Ends a call with the exception that the ranks agreed on; no handler within the call may take it for its own."""

    def __init__(self, failure: Exception) -> None:
        super().__init__(failure)
        self.failure = failure


def _agree(failure: Exception | None) -> None:
    """Goes on where no rank has failed. Else raises _AgreedError with the exception of the first rank that has."""
    import torch

    failed = torch.tensor([failure is not None], dtype=torch.uint8, device="cpu")
    _exchange(lambda group: group.all_reduce(failed, op=group.ReduceOp.MAX))
    if not failed:
        return
    found: list[Any] = [None] * _group.ranks.size
    _exchange(lambda group: group.all_gather_object(found, None if failure is None else _travelling(failure)))
    if failure is not None:
        found[_group.ranks.rank] = failure  # the object itself
    raise _AgreedError(next(error for error in found if error is not None))


def _travelling(error: Exception) -> Exception:
    """An exception as it can be pickled, with its traceback as a note."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note("".join(traceback.format_exception(error)))
    return error


def _serve() -> int:
    """Takes part in the calls of rank 0 until it ends. Returns its exit code."""
    import torch

    def here(storage: Any, location: str) -> Any:
        return storage.cuda() if location.startswith("cuda") else storage

    while True:
        order = _order(None)
        if isinstance(order, int):
            return order

        def call(order: bytes = order) -> None:
            function, arguments, options, generator = torch.load(
                io.BytesIO(order), map_location=here, weights_only=False
            )
            torch.set_rng_state(generator)  # seeds that are drawn are those of rank 0
            function(*arguments, **options)

        try:
            _jointly(call)
        except LostRankError:
            raise
        except Exception:
            continue  # rank 0 has it too, and says what follows


def _order(order: bytes | int | None) -> Any:
    """Rank 0's order on every rank: a call, or its exit code.

    The others wait for a single byte however long that takes, and then for the order no longer than for anything.
    """
    import torch

    byte = torch.zeros(1, dtype=torch.uint8, device="cpu")

    def wake(group: Any) -> None:
        if not _group.ranks.first:
            group.recv(byte, 0, group=_group.orders)
            return
        sent = [group.isend(byte, rank, group=_group.orders) for rank in range(1, _group.ranks.size)]
        for each in sent:
            each.wait(timedelta(seconds=_group.timeout))

    _exchange(wake)
    return _group.ranks.broadcast(order)


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
        size, reason = _group.ranks.size, str(error).splitlines()[0]
        if "timed out" in reason.lower():
            raise LostRankError(f"another of {size} processes did not answer within {_group.timeout:g} s") from error
        ended = any(word in reason.lower() for word in ("connection", "closed", "reset", "peer"))
        raise LostRankError(
            f"another of {size} processes has ended" if ended else f"{size} processes could not exchange: {reason}"
        ) from error
